"""What decides how decoding is built: forms of one layer's products and attention out of a stack, bytes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.speed import measure
from hico_jax.kernels import decode as kernels
from hico_jax.kernels import packed as packs
from hico_jax.models import attention


def decode(small: bool) -> dict[str, Any]:
    """Every form runs through all layers of a stack, each layer's result feeding the next so that none is left out."""
    layers, inner, outer, keys = (2, 128, 256, 128) if small else (24, 3584, 18944, 32768 + 256)
    interpret = jax.default_backend() == "cpu"
    w = jax.random.normal(jax.random.key(0), (layers, inner, outer), jnp.bfloat16) * jnp.asarray(0.02, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (1, inner), jnp.bfloat16)
    found: dict[str, Any] = {}

    def through(form: Callable[[Any, Any, Any], Any], x: Any, *stacks: Any) -> Any:
        def step(i: Any, x: Any) -> Any:
            return x + form(i, x, stacks).astype(x.dtype)

        return jax.lax.fori_loop(0, layers, step, x)

    def tried(name: str, form: Callable[[Any, Any, Any], Any], x: Any, *stacks: Any) -> None:
        moved = sum(s.nbytes for s in stacks)
        try:
            run = jax.jit(lambda x, *s: through(form, x, *s))
            took = measure.seconds(lambda: run(x, *stacks), 5)
        except Exception as error:
            measure.say(f"{name}: failed: {str(error).splitlines()[0][:200]}")
            found[name] = str(error)[:200]
            return
        found[name] = moved / took / 1e12
        measure.say(f"{name}: {found[name]:.2f} TB/s, {took / layers * 1e6:.1f} us a layer")

    back = lambda y: y[:, :inner].astype(jnp.float32) * 1e-3
    tried("dot of p[i]", lambda i, x, s: back(x @ s[0][i]), x, w)
    tried("multiply and reduce", lambda i, x, s: back((x[0, :, None] * s[0][i].astype(x.dtype)).sum(0)[None]), x, w)
    for columns in (64, 128, 256) if not small else (128,):
        for depth, warps, stages in ((16, 4, 4), (32, 4, 4), (64, 4, 3), (32, 8, 4)) if not small else ((32, 4, 4),):
            tiles = kernels.Tiles(columns, depth, 528, warps, stages)
            form = lambda i, x, s, t=tiles: back(kernels.product(x, s, i, tiles=t, interpret=interpret)[0])
            tried(f"kernel {columns}x{depth} warps {warps} stages {stages}", form, x, w)
    for programs in (132, 264, 1056) if not small else ():
        tiles = kernels.Tiles(programs=programs)
        form = lambda i, x, s, t=tiles: back(kernels.product(x, s, i, tiles=t, interpret=interpret)[0])
        tried(f"kernel of {programs} programs", form, x, w)
    q = jax.random.normal(jax.random.key(2), (1, 28, 128), jnp.bfloat16)
    k, v = (
        jax.random.normal(key, (layers, 1, 4, keys, 128), jnp.bfloat16) for key in jax.random.split(jax.random.key(3))
    )
    visible = jnp.arange(keys)[None] < keys - 100
    wrong = lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max())
    one = jnp.asarray(1, jnp.int32)
    got = kernels.product(x, [w], one, interpret=interpret)[0]
    exact = jnp.einsum("BD,DF->BF", x, w[1], preferred_element_type=jnp.float32)
    found["product_error"] = wrong(got, exact)
    got = kernels.attention(q, k, v, one, visible, interpret=interpret)
    exact = attention._attend_one(q[:, None], k[1], v[1], visible)[:, 0].astype(jnp.float32)
    found["attention_error"] = wrong(got, exact)
    measure.say(f"errors: product {found['product_error']:.1e}, attention {found['attention_error']:.1e}")
    tried("attention, XLA", lambda i, q, s: attention._attend_one(q[:, None], s[0][i], s[1][i], visible)[:, 0], q, k, v)
    form = lambda i, q, s: kernels.attention(q, s[0], s[1], i, visible, interpret=interpret)
    tried("attention, kernel", form, q, k, v)
    best = max((v for k, v in found.items() if k.startswith("kernel") and isinstance(v, float)), default=0.0)
    return {
        "value": best, "roof": measure.roofs()["copy"] / 1e12, "forms": found, "peak_gib": measure.peak_gib(),
        "note": "; ".join(f"{k} {v:.2f}" for k, v in found.items() if isinstance(v, float))[:190],
    }  # fmt: skip


def packed(small: bool) -> dict[str, Any]:
    """Products out of packed stacks, of the 7B model's shapes, in several cuts: bytes a second."""
    layers = 2 if small else 12
    shapes = {"gated": (3584, 18944, 2), "down": (18944, 3584, 1), "out": (3584, 3584, 1)}
    shapes = {"gated": (512, 64, 2)} if small else shapes
    interpret = jax.default_backend() == "cpu"
    found: dict[str, Any] = {}
    for kind in ("int8", "rows"):
        for name, (inner, outer, count) in shapes.items():
            size = (layers, outer, inner // (packs.BYTES if kind == "int8" else 1))
            keys = jax.random.split(jax.random.key(0), count)
            if kind == "int8":
                bits = [jax.random.bits(key, size, jnp.uint32) for key in keys]
                values = [jax.lax.bitcast_convert_type(b, jnp.int32) for b in bits]
                scale = jnp.full(size[:2], 1e-4, jnp.float32)
            else:
                values, scale = [jax.random.normal(key, size, jnp.bfloat16) for key in keys], None
            held = [packs.Packed(v, scale, (inner,), (outer,)) for v in values]
            x = jax.random.normal(jax.random.key(1), (1, inner), jnp.float32 if kind == "int8" else jnp.bfloat16)
            gated, moved = count == 2, sum(v.nbytes for v in values)
            chosen = packs.cut_of(held, gated)
            assert chosen is not None
            others = [(16, 128, 2, 8), (8, 128, 2, 8), (8, 128, 4, 8), (16, 128, 1, 8), (4, 64, 8, 4), (8, 64, 4, 4)]
            cuts = [chosen, *(packs.Cut(*c) for c in (others if not small else ()) if packs.Cut(*c) != chosen)]
            for cut in cuts:
                title = f"{kind} {name} {'x'.join(map(str, cut))}{' (chosen)' if cut == chosen else ''}"

                def run(x: Any, held: Any, cut: Any = cut, gated: bool = gated) -> Any:
                    def step(i: Any, total: Any) -> Any:
                        (y,) = packs.product(
                            x + total[:, :1].astype(x.dtype) * 0, held, i, gated=gated, cut=cut, interpret=interpret
                        )  # fmt: skip
                        return total + y

                    return jax.lax.fori_loop(0, layers, step, jnp.zeros((1, held[0].outputs[0]), jnp.float32))

                try:
                    jitted = jax.jit(run)
                    took = measure.seconds(lambda f=jitted, x=x, held=held: f(x, held), 5)
                except Exception as error:
                    measure.say(f"{title}: failed: {str(error).splitlines()[0][:200]}")
                    found[title] = str(error)[:200]
                    continue
                found[title] = moved / took / 1e12
                measure.say(f"{title}: {found[title]:.2f} TB/s, {took / layers * 1e6:.1f} us a layer")
    best = max((v for v in found.values() if isinstance(v, float)), default=0.0)
    return {
        "value": best, "roof": measure.roofs()["copy"] / 1e12, "forms": found, "peak_gib": measure.peak_gib(),
        "note": "; ".join(f"{k} {v:.2f}" for k, v in found.items() if isinstance(v, float) and "chosen" in k),
    }  # fmt: skip
