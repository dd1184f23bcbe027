"""Context-parallel attention and million-token steps on GPUs: correct, how fast against one GPU, and does it fit.

    python benchmarks/ring_gpu.py --json out.json              # all parts, about twenty minutes on two H200
    python benchmarks/ring_gpu.py --only correct,attention     # some
    JAX_NUM_CPU_DEVICES=2 python benchmarks/ring_gpu.py --small  # a try on a CPU, sizes of a toy

    correct     ring, gather, usp in bf16 against one device and float32: relative error of values and gradients
    attention   one layer of Qwen2-7B heads, forward and backward, at 131k, 262k and 524k tokens: ratio to one device,
                as models run it there, and to cuDNN's plain causal kernel, which knows no padding
    step        one optimizer step of the 2B model (Qwen2.5-1.5B) on one row of 1,048,576 tokens
    prefill     Qwen2-7B on one row of 1,048,576 tokens

Every part is tried; one that fails is reported and the next goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import time
import traceback
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax import generate, losses, registry
from hico_jax.kernels import ring
from hico_jax.models import attention
from hico_jax.models.llm.decoder import Stream
from hico_jax.parallel import context, sharding, zigzag
from hico_jax.parallel.mesh import MeshConfig, make_mesh

HEADS, KV_HEADS, WIDTH = 28, 4, 128
PLAIN = {"gpu": "cudnn", "cuda": "cudnn", "cpu": "xla"}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def say(*words: Any) -> None:
    """Print at once."""
    print(*words, flush=True)


def seconds(run: Any, at_most: float = 6.0) -> tuple[float, int]:
    """Median of 1 to 5 runs, as many as `at_most` seconds hold, after one that is not counted; and how many."""
    jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < 5 and (not times or sum(times) + times[0] <= at_most):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times), len(times)


def peak_gib() -> float:
    """Of the first device, since the start."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0) / 2**30


def row(length: int, segments: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of one row; segment lengths, the rest padding."""
    if not segments:
        return np.arange(length, dtype=np.int32)[None], np.ones((1, length), np.int32)
    positions, ids, at = np.zeros((1, length), np.int32), np.zeros((1, length), np.int32), 0
    for s, n in enumerate(segments):
        positions[0, at : at + n], ids[0, at : at + n] = np.arange(n), s + 1
        at += n
    return positions, ids


def gradients(count: int, strategy: str) -> tuple[Any, Any]:
    """The mesh, and `(q, k, v, positions, segments, d_out) -> gradients, output` as models would run it."""
    mesh = make_mesh(MeshConfig(1, 1, count, 1), jax.devices()[:count])

    def loss(q: Any, k: Any, v: Any, p: Any, s: Any, d_out: Any) -> Any:
        if strategy == "plain":
            out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=PLAIN[sharding.platform()])
        else:
            out = attention.attend(q, k, v, q_positions=p, k_positions=p, q_segments=s, k_segments=s)
        return (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(), out

    run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))

    def call(*arrays: Any) -> Any:
        with jax.set_mesh(mesh), context.using("auto" if strategy == "plain" else strategy):
            return run(*arrays)

    return mesh, call


def placed(mesh: Any, arrays: list[Any], count: int) -> list[Any]:
    """Dealt, and laid out on the mesh."""
    places = zigzag.order(arrays[0].shape[1], count)
    found = dict(mesh.shape)

    def put(a: Any) -> Any:
        axes = ("batch", "length") + (None,) * (a.ndim - 2)
        where = jax.sharding.NamedSharding(mesh, sharding.spec(a.shape, axes, found))
        return jax.device_put(np.asarray(a)[:, places] if count > 1 else a, where)

    return [put(a) for a in arrays]


def qkv(length: int, dtype: Any, seed: int = 0) -> list[np.ndarray]:
    """Random queries, keys, values and output gradients."""
    rng = np.random.default_rng(seed)
    make = lambda heads: (rng.standard_normal((1, length, heads, WIDTH), np.float32)).astype(dtype)
    return [make(HEADS), make(KV_HEADS), make(KV_HEADS), make(HEADS)]


def made(mesh: Any, length: int, count: int) -> list[Any]:
    """Random arrays, made where they live."""
    positions, segments = placed(mesh, list(row(length)), count)
    found = dict(mesh.shape)

    def one(key: int, heads: int) -> Any:
        shape = (1, length, heads, WIDTH)
        place = jax.sharding.NamedSharding(mesh, sharding.spec(shape, ("batch", "length", None, None), found))
        return jax.jit(lambda: jax.random.normal(jax.random.key(key), shape, jnp.bfloat16), out_shardings=place)()

    return [one(0, HEADS), one(1, KV_HEADS), one(2, KV_HEADS), positions, segments, one(3, HEADS)]


def correct(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Against one device in float32."""
    length = 512 if args.small else 8192
    results = []
    for name, segments in {"one segment": (), "packed": (length // 2 - 77, length // 4, length // 8)}.items():
        q, k, v, d_out = qkv(length, jnp.bfloat16)
        where = row(length, segments)
        mesh, run = gradients(1, "ring")
        exact = [np.asarray(a, np.float32) for a in (q, k, v)]
        expected = jax.tree.map(np.asarray, run(*placed(mesh, [*exact, *where, np.asarray(d_out, np.float32)], 1)))
        for strategy in ring.STRATEGIES:
            mesh, run = gradients(args.devices, strategy)
            places = zigzag.order(length, args.devices)
            found = run(*placed(mesh, [q, k, v, *where, d_out], args.devices))
            errors = {}
            for part, f, e in zip("qkvo", jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                errors[part] = float(np.abs(np.asarray(f, np.float32) - e[:, places]).max() / np.abs(e).max())
            good = max(errors.values()) < 2e-2
            results.append({"rows": name, "strategy": strategy, "good": good, **errors})
            say(
                f"correct    {name:12} {strategy:7} {'ok ' if good else 'BAD'} "
                + " ".join(f"{n} {x:.1e}" for n, x in errors.items())
            )
    return results


def attention_speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward and backward of one layer, TFLOP/s of half-causal work over all devices."""
    results = []
    for length in (1024,) if args.small else [int(n) for n in args.lengths.split(",")]:
        flops = 7 * 2 * length**2 * HEADS * WIDTH / 2 * 1.0  # 2 products forward, 5 backward, half of each
        base, plain = None, None
        for count, strategy in [(1, "ring"), (1, "plain"), *((args.devices, s) for s in args.strategies.split(","))]:
            try:
                mesh, run = gradients(count, strategy)
                arrays = made(mesh, length, count)
                took, repeats = seconds(functools.partial(run, *arrays))
            except Exception as error:
                say(f"attention  {length:7} {count} x {strategy:7} failed: {str(error).splitlines()[0][:160]}")
                results.append({"length": length, "devices": count, "strategy": strategy, "error": str(error)[:300]})
                continue
            base = base or took
            plain = took if strategy == "plain" else plain
            ratio, to_plain = base / took, plain and plain / took
            results.append(
                {"length": length, "devices": count, "strategy": strategy, "seconds": took, "ratio": ratio,
                 "ratio_to_plain": to_plain, "tflops": flops / took / 1e12, "repeats": repeats}
            )  # fmt: skip
            if args.json:  # a run that is cut short has shown something
                pathlib.Path(args.json).with_suffix(".attention.json").write_text(json.dumps(results, indent=1))
            name = "one" if (count, strategy) == (1, "ring") else strategy
            say(
                f"attention  {length:7} {count} x {name:7} {took * 1e3:9.1f} ms  "
                f"{flops / took / 1e12:7.0f} TFLOP/s  {ratio:.2f} x one, "
                f"{to_plain or 0:.2f} x plain  (median of {repeats})"
            )
            arrays = None
    return results


def language_model(name: str, small: bool, **changes: Any) -> Any:
    """A named model's language part."""
    config = registry.model_config("tiny" if small else name).llm
    return dataclasses.replace(config, **changes)


def weights_of(config: Any, mesh: Any, dtype: Any) -> tuple[Any, Any]:
    """Structure and random weights of a language model, made where they live."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    places = sharding.shardings(state, mesh)

    @functools.partial(jax.jit, out_shardings=places)
    def make() -> Any:
        keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(state))))

        def one(path: Any, a: Any) -> Any:
            if any(getattr(p, "key", None) == "scale" for p in path):
                return jnp.ones(a.shape, dtype)
            return jax.random.normal(next(keys), a.shape, dtype) * 0.02

        return jax.tree_util.tree_map_with_path(one, state)

    return graph, make()


def stream_of(length: int, width: int, mesh: Any, count: int, dtype: Any) -> Stream:
    """A row of random embeddings, dealt; every token predicts one."""
    found = dict(mesh.shape)

    def place(*axes: Any, shape: tuple[int, ...]) -> Any:
        return jax.sharding.NamedSharding(mesh, sharding.spec(shape, axes, found))

    at = place("batch", "length", shape=(1, length))
    positions = jax.device_put(zigzag.order(length, count).astype(np.int32)[None], at)
    ones = jax.device_put(np.ones((1, length), np.int32), at)
    x = jax.jit(
        lambda: jax.random.normal(jax.random.key(1), (1, length, width), dtype),
        out_shardings=place("batch", "length", None, shape=(1, length, width)),
    )()
    return Stream(
        x=x, positions=positions, segments=ones, slots=-ones, targets=ones, weights=ones.astype(jnp.float32), ring=count
    )


def model_flops(config: Any, tokens: int, training: bool) -> float:
    """Half-causal convention: 2 per weight and token, 2 S^2 H d forward per layer, three times that to train."""
    layer = (
        config.embed_dim * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
        + 3 * config.embed_dim * config.mlp_dim
    )
    weights = config.num_layers * layer + (config.vocab_size * config.embed_dim if training else 0)
    forward = 2.0 * weights * tokens + 2.0 * tokens**2 * config.num_heads * config.head_dim * config.num_layers
    return forward * (3 if training else 1)


def report(
    name: str, config: Any, tokens: int, took: float, training: bool, count: int, extra: str = ""
) -> dict[str, Any]:
    """Say and return a step's figures."""
    kind = jax.devices()[0].device_kind
    peak = next((p for n, p in PEAKS.items() if n in kind), None)
    flops = model_flops(config, tokens, training)
    mfu = flops / took / count / peak if peak else None
    say(
        f"{name:10} {tokens:8} tokens on {count} x {kind}: {took:.1f} s, {tokens / took:,.0f} tokens/s, "
        f"{flops / took / count / 1e12:.0f} TFLOP/s a device, "
        f"MFU {mfu and f'{mfu:.1%}'}, peak {peak_gib():.1f} GiB {extra}"
    )
    return {
        "tokens": tokens,
        "seconds": took,
        "tflops": flops / took / count / 1e12,
        "mfu": mfu,
        "peak_gib": peak_gib(),
    }


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Updates of the 2B model's language part in mixed precision; the last is timed.

    float32 weights and two float32 moments are held and updated, as in training.
    """
    tokens, count = (1024 if args.small else args.step_tokens), args.devices
    config = language_model("umt_hd_qwen2_5_1_5b", args.small, remat=True, remat_keeps=args.keeps)
    mesh = make_mesh(MeshConfig(1, 1, count, 1), jax.devices()[:count])
    with jax.set_mesh(mesh), context.using(args.strategy):
        graph, weights = weights_of(config, mesh, jnp.float32)
        moments = jax.tree.map(jnp.zeros_like, (weights, weights))
        stream = stream_of(tokens, config.embed_dim, mesh, count, jnp.bfloat16)

        def loss_of(weights: Any, stream: Stream) -> Any:
            llm = nnx.merge(graph, weights)
            out, _ = llm(stream, None)
            loss = losses.next_token(out.x, llm.unembed_weight(), out.targets, out.weights, chunk=2048)
            return loss.total / loss.weight

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(weights: Any, moments: Any, stream: Stream) -> Any:
            loss, grads = jax.value_and_grad(loss_of)(weights, stream)
            mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
            nu = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, moments[1], grads)
            weights = jax.tree.map(lambda w, m, v: w - 1e-5 * m / (jnp.sqrt(v) + 1e-8), weights, mu, nu)
            return weights, (mu, nu), loss

        took, loss, compiled = 0.0, float("nan"), update.lower(weights, moments, stream).compile()
        for _ in range(args.steps):
            began = time.perf_counter()
            weights, moments, loss = compiled(weights, moments, stream)
            loss = float(loss)
            took = time.perf_counter() - began
            say(f"step       took {took:.1f} s, loss {loss:.3f}")
    assert np.isfinite(loss)
    return report("step", config, tokens, took, True, count, f"(loss {loss:.3f})")


def prefill(args: argparse.Namespace) -> dict[str, Any]:
    """Logits after a row of embeddings, and the cache that decoding goes on from."""
    tokens, count = (1024 if args.small else args.prefill_tokens), args.devices
    config = language_model("umt_qwen2_5_7b_1m", args.small)
    mesh = make_mesh(MeshConfig(1, 1, count, 1), jax.devices()[:count])
    with jax.set_mesh(mesh), context.using(args.strategy):
        graph, weights = weights_of(config, mesh, jnp.bfloat16)
        stream = stream_of(tokens, config.embed_dim, mesh, count, jnp.bfloat16).replace(targets=None, weights=None)
        run = jax.jit(lambda w, s: generate.prefill(nnx.merge(graph, w), s, None, room=1024))
        compiled = run.lower(weights, stream).compile()
        began = time.perf_counter()
        logits, cache = jax.block_until_ready(compiled(weights, stream))
        took = time.perf_counter() - began
        size = sum(a.nbytes for a in jax.tree.leaves(cache)) / 2**30
    assert np.isfinite(np.asarray(logits, np.float32)).all()
    return report("prefill", config, tokens, took, False, count, f"(cache {size:.1f} GiB over {count})")


PARTS = {"correct": correct, "attention": attention_speed, "step": step, "prefill": prefill}


def main() -> int:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=min(2, len(jax.devices())))
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma")
    parser.add_argument("--strategy", default="gather", help="of step and prefill: ring, gather or usp")
    parser.add_argument("--keeps", default="nothing", help="of the step: what a recomputed layer keeps")
    parser.add_argument("--lengths", default="131072,262144,524288", help="of attention, by comma")
    parser.add_argument("--strategies", default=",".join(ring.STRATEGIES), help="of attention, by comma")
    parser.add_argument("--steps", type=int, default=2, help="of the step; the last is timed, compiling is not")
    parser.add_argument("--step-tokens", type=int, default=1 << 20)
    parser.add_argument("--prefill-tokens", type=int, default=1 << 20)
    parser.add_argument("--small", action="store_true", help="a toy's sizes")
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    say(f"jax {jax.__version__}, {len(jax.devices())} x {jax.devices()[0].device_kind}")
    results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for name in args.only.split(","):
        began = time.perf_counter()
        try:
            results[name] = PARTS[name](args)
        except Exception as error:
            traceback.print_exc(limit=4)
            results[name] = {"error": str(error)[:500]}
            say(f"{name}: failed: {str(error).splitlines()[0][:200]}")
        say(f"-- {name} took {time.perf_counter() - began:.0f} s in all")
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
