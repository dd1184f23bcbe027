from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hico_jax.models.compress import tome
from hico_jax.parallel.mesh import MeshConfig, make_mesh

FORMS = ("onehot", "gather")
F32 = jnp.dtype(jnp.float32)


merge = jax.jit(tome.merge, static_argnums=(1, 2), static_argnames=("faithful_dtype", "form"))
trace_merge = jax.jit(tome.merge_with_trace, static_argnums=(1, 2), static_argnames=("faithful_dtype", "form"))


def f32(x):
    return np.asarray(x).astype(np.float32)


def oracle(x, num_tokens, num_heads, grid=np.float64):
    """Token by token, for one clip; every intermediate is rounded to `grid`. Also the steps and final sizes."""

    def r(a):
        return np.asarray(a, np.float64).astype(grid).astype(np.float64)

    x, sizes, steps = x.astype(np.float64), np.ones(len(x)), []
    while len(x) > num_tokens:
        num_merged = min(len(x) - num_tokens, len(x) // 2)
        metric = r(x.reshape(len(x), num_heads, -1).mean(1))
        norm = r(np.sqrt((metric**2).sum(1, keepdims=True)))
        unit = r(metric / np.where(norm > 0, norm, 1))
        scores = r(unit[::2] @ unit[1::2].T)
        destination, best = scores.argmax(1), scores.max(1)
        order = np.argsort(-best, kind="stable")
        weighted = r(x * sizes[:, None])
        total, count = weighted[1::2].copy(), sizes[1::2].copy()
        for a in order[:num_merged]:
            total[destination[a]] += weighted[::2][a]
            count[destination[a]] += sizes[::2][a]
        left = order[num_merged:]
        total, count = np.concatenate([weighted[::2][left], r(total)]), np.concatenate([sizes[::2][left], r(count)])
        x, sizes = r(total / count[:, None]), count
        steps.append((destination, order, num_merged))
    return x, sizes, steps


def test_six_tokens_by_hand():
    # Even tokens 0, 2, 4 and odd tokens 1, 3, 5. Token 0 is like 1, token 2 like 5, token 4 (most alike) like 5.
    x = np.float32([[1, 0.1], [1, 0], [0.3, 1], [-1, 0], [0, 2], [0, 1]])[None]
    out, trace = trace_merge(jnp.asarray(x), 4, 1)
    (step,) = trace.steps
    np.testing.assert_array_equal(step.destination, [[0, 2, 2]])
    np.testing.assert_array_equal(step.rank, [[1, 2, 0]])  # cosines .995, .958, 1
    np.testing.assert_allclose(out[0], [[0.3, 1], [1, 0.05], [-1, 0], [0, 1.5]], rtol=1e-6)  # token 2 stays, first
    np.testing.assert_array_equal(trace.sizes, [[1, 2, 1, 2]])
    np.testing.assert_allclose(
        merge(jnp.asarray(x), 3, 1)[0], [[1, 0.05], [-1, 0], [0.1, 4 / 3]], rtol=1e-6
    )  # all even tokens merge: order is that of the odd ones


@pytest.mark.parametrize(
    ("patches", "tokens", "steps"),
    [
        (784, 64, (392, 196, 98, 34)),
        (3136, 64, (1568, 784, 392, 196, 98, 34)),
        (196, 64, (98, 34)),
        (1024, 64, (512, 256, 128, 64)),
        (100, 37, (50, 13)),
        (7, 2, (3, 2)),
        (16, 16, ()),
    ],
)
def test_schedule(patches, tokens, steps):
    assert tome.merge_schedule(patches, tokens) == steps


def test_mistakes_say_what_to_change():
    with pytest.raises(ValueError, match=r"cannot merge 15 patches into 16 tokens.*tokens_per_image"):
        tome.merge_schedule(15, 16)
    with pytest.raises(ValueError, match="tokens_per_frame is 0"):
        tome.ToMeConfig(tokens_per_frame=0)
    with pytest.raises(ValueError, match="'onehot', 'gather' or None"):
        merge(jnp.ones((1, 4, 2)), 2, 1, form="sort")


@pytest.mark.parametrize("form", FORMS)
def test_recorded_reference(golden, form):
    for name in golden.names("A_tome"):
        case = golden.case("A_tome", name)
        if "r_list" not in case["config"]:
            continue
        tensors, config = golden.tensors(case["file"]), case["config"]
        assert list(tome.merge_schedule(tensors["x"].shape[1], config["target_num_token"])) == config["r_list"]
        out, trace = trace_merge(tensors["x"], config["target_num_token"], config["heads"], form=form)
        # Values are O(1); only the order of sums differs. Reached: 4e-7.
        np.testing.assert_allclose(out, tensors["out"], atol=2e-6, err_msg=name)
        np.testing.assert_array_equal(trace.sizes, tensors["size"][..., 0], err_msg=name)
        for i, (step, num_merged) in enumerate(zip(trace.steps, config["r_list"], strict=True)):
            check_step(step, num_merged, tensors, f"step{i}.", name)


def check_step(step, num_merged, tensors, prefix, name):
    order = np.argsort(step.rank, -1)
    np.testing.assert_array_equal(order[:, num_merged:], tensors[f"{prefix}unm_idx"], err_msg=name)
    merged, source = np.sort(order[:, :num_merged], -1), tensors[f"{prefix}src_idx"]
    np.testing.assert_array_equal(merged, np.sort(source, -1), err_msg=name)
    found = np.take_along_axis(np.asarray(step.destination), source, -1)
    np.testing.assert_array_equal(found, tensors[f"{prefix}dst_idx"], err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_recorded_single_step(golden, form):
    tensors = golden.tensors("A_tome_bsm_direct_r13.safetensors")
    found = jax.jit(tome.match, static_argnums=(1, 2))(tensors["metric"], 13, F32)
    check_step(found, 13, tensors, "", "bsm_direct")
    sizes = jnp.asarray(tensors["size_in"][..., 0])
    mean, count = tome.combine(jnp.asarray(tensors["x"]), sizes, found, 13, grid=F32, form=form)
    np.testing.assert_allclose(mean, tensors["wavg"], atol=2e-6)
    np.testing.assert_allclose(count, tensors["size_out"][..., 0], rtol=1e-6)


def test_published_numbers():
    n = np.arange(784 * 1024, dtype=np.float64)
    x = np.sin(0.37 * n + 3 * np.cos(1.7 * n)).astype(np.float32).reshape(1, 784, 1024)
    out = np.asarray(merge(x, 64, 16), np.float64)[0]
    assert abs(out.sum() - 0.641047) < 1e-3  # of 65,536 numbers
    assert abs(np.abs(out).sum() - 39941.238) < 0.02
    np.testing.assert_allclose(out[0, :3], [0.842901, 0.013538, -0.562910], atol=1e-6)
    np.testing.assert_allclose(out[63, :3], [-0.183947, -0.971217, -0.768770], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("patches", "tokens"), [(12, 5), (15, 4), (9, 8), (7, 1)])
def test_matches_oracle(form, patches, tokens):
    x = np.random.default_rng(patches).normal(size=(3, patches, 8)).astype(np.float32)
    out, trace = trace_merge(jnp.asarray(x), tokens, 2, form=form)
    for b in range(3):
        expected, sizes, steps = oracle(x[b], tokens, 2)
        np.testing.assert_allclose(out[b], expected, atol=1e-6)
        np.testing.assert_array_equal(trace.sizes[b], sizes)
        for step, (destination, order, _) in zip(trace.steps, steps, strict=True):
            np.testing.assert_array_equal(step.destination[b], destination)
            np.testing.assert_array_equal(np.argsort(step.rank[b]), order)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_matches_finite_differences(form):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(11, 4)).astype(np.float32), rng.normal(size=(5, 4))
    found = jax.jit(jax.grad(lambda x: (merge(x[None], 5, 2, form=form)[0] * jnp.float32(weight)).sum()))(x)
    expected = np.zeros(x.shape)
    for at in np.ndindex(x.shape):  # 1e-6 is far below the gaps between scores: the choice stays
        step = np.zeros(x.shape)
        step[at] = 1e-6
        up, down = (oracle(x.astype(np.float64) + s * step, 5, 2)[0] for s in (1, -1))
        expected[at] = ((up - down) * weight).sum() / 2e-6
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_ties_take_the_lower_index(form):
    out, trace = trace_merge(jnp.ones((2, 12, 4)), 8, 2, form=form)
    np.testing.assert_array_equal(trace.steps[0].destination, np.zeros((2, 6)))
    np.testing.assert_array_equal(trace.steps[0].rank, np.tile(np.arange(6), (2, 1)))
    np.testing.assert_array_equal(trace.sizes, [[1, 1, 5, 1, 1, 1, 1, 1]] * 2)
    np.testing.assert_array_equal(out, np.ones((2, 8, 4)))


@pytest.mark.parametrize("form", FORMS)
def test_tokens_of_zeros_stay_finite(form):
    x = np.random.default_rng(0).normal(size=(2, 12, 4)).astype(np.float32)
    x[0, 3] = x[0, 4] = 0
    x[1] = 0
    out, grads = jax.jit(jax.value_and_grad(lambda x: merge(x, 5, 2, form=form).sum()))(jnp.asarray(x))
    assert np.isfinite(out)
    assert np.isfinite(grads).all()
    assert np.abs(grads[0]).min() > 0  # every patch is in some token
    np.testing.assert_array_equal(merge(jnp.asarray(x), 5, 2, form=form)[1], 0)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_patches_are_merged_in_float32(form):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 20, 8)), jnp.bfloat16)
    out = merge(x, 7, 2, form=form)
    assert out.dtype == jnp.bfloat16
    exact = merge(x.astype(jnp.float32), 7, 2, form=form)
    np.testing.assert_array_equal(f32(out), f32(exact.astype(jnp.bfloat16)))
    np.testing.assert_array_equal(f32(out), f32(merge(x, 7, 2, form=form)))


@pytest.mark.parametrize("form", FORMS)
def test_faithful_dtype_rounds_every_step(form):
    # Eighths of one head of four: products and sums are exact, so the only rounding is the one asked for.
    x = (np.random.default_rng(3).integers(-16, 17, size=(48, 4)) / 8).astype(ml_dtypes.bfloat16)
    expected, sizes, _ = oracle(x, 5, 1, ml_dtypes.bfloat16)
    out, trace = trace_merge(jnp.asarray(x)[None], 5, 1, faithful_dtype=True, form=form)
    np.testing.assert_array_equal(trace.sizes[0], sizes)
    np.testing.assert_array_equal(f32(out[0]), expected)
    assert (expected != oracle(x, 5, 1)[0].astype(ml_dtypes.bfloat16)).any()  # the switch does something


def test_forms_agree_with_gradients():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 98, 16)), jnp.float32)

    def run(form):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sin(merge(x, 33, 4, form=form)).sum()))(x)

    (a, da), (b, db) = run("onehot"), run("gather")
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(da, db, atol=1e-6)


def test_every_row_alone():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 20, 8)), jnp.float32)
    together = merge(x, 7, 2)
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x: merge(x[None], 7, 2)[0]))(x), together)
    np.testing.assert_array_equal(merge(x[2:3], 7, 2)[0], together[2])


def test_accelerators_get_products_only():
    """Not one gather, scatter or sort, forward and backward; the same count finds them in the form for CPU."""
    grad = jax.jit(jax.grad(lambda x: merge(x, 13, 4).astype(jnp.float32).sum()))

    def count(platform):
        traced = grad.trace(jax.ShapeDtypeStruct((2, 98, 16), jnp.bfloat16))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return {op: len(re.findall(rf"stablehlo\.{op}\b", text)) for op in ("gather", "scatter", "sort")}

    assert count("tpu") == count("cuda") == {"gather": 0, "scatter": 0, "sort": 0}
    assert all(count("cpu").values())


@pytest.mark.parametrize("form", FORMS)
def test_no_communication_between_clips(form):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    split = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp", "sequence")))
    x = jax.device_put(np.random.default_rng(0).normal(size=(8, 20, 8)).astype(np.float32), split)
    run = jax.jit(lambda x: merge(x, 7, 2, form=form), out_shardings=split)
    text = run.lower(x).compile().as_text()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text)
    np.testing.assert_allclose(run(x), merge(np.asarray(x), 7, 2, form=form), atol=1e-6)


def test_module_uses_its_config():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 8)), jnp.bfloat16)
    for faithful in (False, True):
        module = tome.ToMeConfig(faithful_dtype=faithful).build(num_heads=2)
        expected = merge(x, 4, 2, faithful_dtype=faithful)
        np.testing.assert_array_equal(f32(jax.jit(lambda x, m=module: m(x, 4))(x)), f32(expected))


def test_merging_without_time_is_merging_each_frame_alone() -> None:
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, 4 * 16, 8)), jnp.float32)
    apart, joined = (tome.ToMe(c, 2) for c in (tome.ToMeConfig(4, 4, scope="frame"), tome.ToMeConfig(4, 4)))
    found = jax.jit(lambda x: apart(x, 16, 4))(x)
    for t in range(4):
        alone = merge(x[:, t * 16 : (t + 1) * 16], 4, 2)
        np.testing.assert_allclose(found[:, t * 4 : (t + 1) * 4], alone, atol=1e-6)
    together = jax.jit(lambda x: joined(x, 16, 4))(x)
    assert np.abs(np.asarray(found) - np.asarray(together)).max() > 0.1
    with pytest.raises(ValueError, match=r"compressor\.scope is 'film'"):
        tome.ToMeConfig(scope="film")
