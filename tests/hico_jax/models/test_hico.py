"""Whole models and their gradients against the recorded reference; pixels to floats bit for bit; eight devices.

The two recorded cases of `frame_anyres` are left out: frames are never tiled here, as the released model's own code
raises when they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline import image, layout
from hico_jax import ask, generate, losses, registry
from hico_jax.batch import Batch, DropSchedule
from hico_jax.convert import load
from hico_jax.generate import GenerationConfig
from hico_jax.models import hico
from hico_jax.models.llm import decoder
from hico_jax.parallel.mesh import MeshConfig, make_mesh
from hico_jax.parallel.sharding import batch_shardings, shardings
from tests import golden_rows
from tests.golden_rows import close

IGNORED = -100
# One shape for every prompt, so that three programs serve them all; what is padded must change nothing.
PROMPT = {"length": 400, "num_clips": 2, "num_tiles": 5, "training": False}
PROMPTS = (
    "umt224_video_eval",
    "umt224_image_anyres_eval",
    "umt224_image_anyres_5tiles_eval",
    "umt224_image_single_eval",
    "umt224_text_only_dummy_image_eval",
    pytest.param("internvideo2_video_eval", marks=pytest.mark.slow),  # tests/hico_jax/test_api.py runs it too
    "umt224_video_eval_llm_uniform0_attention",
    pytest.param("umt224_video_eval_llm_attention", marks=pytest.mark.slow),  # the one before holds what this one holds
)
TRAINED = (
    "umt224_video_train",
    "internvideo2_image_anyres_loss_evalmode",
    "umt224_mixed_batch_train",
    "umt224_video_image_train_llm_uniform0_attention",
    pytest.param("umt224_video_image_train_llm_attention", marks=pytest.mark.slow),
)

INTERNVL_TRAINED = ("full_r16_batch_train", "full_r16_video_two_turn_labels", "full_r16_text_only_dummy")


@pytest.fixture(scope="module")
def load_model(golden: Any) -> Callable[[str], hico.HiCo]:
    return functools.cache(lambda name: load.load(golden.folder / name, activations="float32").model)


def model_of(loaded: hico.HiCo, config: dict[str, Any]) -> hico.HiCo:
    """The loaded weights under a case's schedule."""
    if not config["mm_llm_compress"]:
        return loaded
    layers, ratios = (tuple(config[f"llm_{n}_list"]) for n in ("compress_layer", "image_token_ratio"))
    return ask.with_drop(loaded, DropSchedule(config["llm_compress_type"], layers, ratios))


@jax.jit
def run(model: hico.HiCo, batch: Batch, visual: Any) -> Any:
    """Logits, the last stream, and what every stage of compression left."""
    stream = model.splice(batch, visual)
    end, _, stages = decoder.run(
        model.llm.blocks, stream, batch.drop, schedule=model.config.drop, angles=model.llm.angles
    )
    return model.llm.norm(end.x) @ model.llm.unembed_weight(), end, stages


@jax.jit
def teach(model: hico.HiCo, batch: Batch, visual: Any, tokens: Any) -> Any:
    """Logits of every step of a given answer, through the cache."""
    stream = model.splice(batch, visual)
    first, cache = generate.prefill(model.llm, stream, batch.drop, schedule=model.config.drop, room=len(tokens))

    def step(cache: Any, token: Any) -> Any:
        x, cache = model.llm.decode(model.llm.embed(token[None, None]), cache)
        return cache, generate.logits_of(model.llm, x)[:, 0]

    _, others = jax.lax.scan(step, cache, tokens[:-1])
    return jnp.concatenate([first[None], others])[:, 0]


_encode = jax.jit(lambda model, clips, images: model.encode(clips, images))


def same_features(visual: np.ndarray, name: str, tensors: dict[str, np.ndarray], golden: Any, num_clips: int) -> None:
    """Every entry of the media, in its place among the row's clips and tiles. All of these have 64 tokens."""
    media = golden.case("F_full", name)["config"]["media"]
    ids = tensors["input_ids"]
    row_of = [b for b in range(len(ids)) for _ in range(max(1, int((ids[b] < 0).sum())))]
    clip, tile = [0] * len(ids), [0] * len(ids)
    for k, (entry, b) in enumerate(zip(media, row_of, strict=True)):
        if entry["modality"] == "text":
            continue
        expected = tensors[f"media{k}.features"]
        used = clip if entry["modality"] == "video" else tile
        first = (used[b] + (0 if used is clip else num_clips)) * 64
        used[b] += len(expected)
        close(visual[b, first : first + len(expected) * 64], expected.reshape(-1, expected.shape[-1]))


def same_stages(before: np.ndarray, stages: Any, tensors: dict[str, np.ndarray]) -> None:
    """Who stays after each stage, where, and the scores that chose them."""
    for s, stage in enumerate(stages):
        after = np.asarray(stage.stream.slots)
        compressed = 0
        for b in range(len(after)):
            was, now = before[b][before[b] >= 0], after[b][after[b] >= 0]
            if len(was) == len(now):
                continue  # the reference recorded nothing for a row it left alone
            kept = np.flatnonzero(np.isin(was, now))
            np.testing.assert_array_equal(kept, tensors[f"stage{s}.sel{compressed}.kept"])
            np.testing.assert_array_equal(now, was[kept])
            if f"stage{s}.sel{compressed}.scores" in tensors:
                scores = np.asarray(stage.scores[b])[np.flatnonzero(before[b] >= 0)]
                np.testing.assert_allclose(scores, tensors[f"stage{s}.sel{compressed}.scores"], rtol=1e-4)
            compressed += 1
        assert f"stage{s}.sel{compressed}.kept" not in tensors
        positions = tensors[f"stage{s}.position_ids"]
        np.testing.assert_array_equal(stage.stream.positions[:, : positions.shape[1]], positions)
        before = after


@pytest.mark.parity
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_equal_the_reference(golden: Any, load_model: Callable[[str], hico.HiCo], name: str) -> None:
    case = golden.case("F_full", name)
    loaded = load_model(case["config"]["checkpoint"])
    tensors, model = golden.tensors(case["file"]), model_of(loaded, case["config"])
    batch = golden_rows.batch_of(golden, name, model.config.geometry(), **PROMPT)
    visual = _encode(loaded, batch.clips, batch.images)  # `loaded`: the schedule is no part of encoding
    same_features(np.asarray(visual), name, tensors, golden, 2)
    bare = dataclasses.replace(batch, clips=None, images=None)
    logits, end, stages = run(model, bare, visual)
    same_stages(batch.slots, stages, tensors)
    logits = np.asarray(logits[0])[: int((end.segments[0] > 0).sum())]
    close(logits[-24:], tensors["logits_last24"] if "logits_last24" in tensors else tensors["logits"][0, -24:])
    if "logits" in tensors:
        close(logits, tensors["logits"][0])
    else:
        close(logits[::4], tensors["logits_strided4"])
    if "generated_ids" not in tensors:
        return
    tokens = tensors["generated_ids"].astype(np.int32)
    close(teach(model, bare, visual, tokens), tensors["step_logits"])
    made = generate.generate(model, (batch, visual), GenerationConfig(max_new_tokens=len(tokens), eos=()))
    np.testing.assert_array_equal(made.ids[0], tokens)


@jax.jit
def learn(model: hico.HiCo, batch: Batch) -> Any:
    """Loss with everything seen on the way, and gradients."""

    def loss(model: hico.HiCo) -> Any:
        visual = model.encode(batch.clips, batch.images)
        logits, end, stages = run(model, batch, visual)
        hidden = model.llm.norm(end.x)
        found = losses.next_token(hidden, model.llm.unembed_weight(), end.targets, end.weights, chunk=64)
        return found.total / found.weight, (visual, logits, end, stages)

    return jax.value_and_grad(loss, has_aux=True)(model)


@pytest.mark.parity
@pytest.mark.parametrize("name", TRAINED)
def test_training_equals_the_reference(golden: Any, load_model: Callable[[str], hico.HiCo], name: str) -> None:
    case = golden.case("F_full", name)
    config, tensors = case["config"], golden.tensors(case["file"])
    model = model_of(load_model(config["checkpoint"]), config)
    batch = golden_rows.batch_of(golden, name, model.config.geometry())
    (value, (visual, logits, end, stages)), grads = learn(model, batch)
    same_features(np.asarray(visual), name, tensors, golden, batch.clips.shape[1])
    np.testing.assert_array_equal(batch.segments, tensors["spliced_attention_mask"])
    begun = decoder.final_weights(decoder.Stream.begin(jnp.zeros((*batch.shape, 1)), jax.tree.map(jnp.asarray, batch)))
    same_labels(begun, tensors["spliced_labels"])
    same_stages(batch.slots, stages, tensors)
    for s, stage in enumerate(stages):
        same_labels(decoder.final_weights(stage.stream), tensors[f"stage{s}.labels"])
        np.testing.assert_array_equal(stage.stream.segments, tensors[f"stage{s}.attention_mask"])
    same_labels(end, tensors["labels_after"])
    valid = tensors["valid_after"].astype(bool)
    np.testing.assert_array_equal(end.segments > 0, valid)
    logits = np.where(valid[..., None], logits, 0.0)
    close(logits[:, ::8], tensors["logits_strided8"])
    close(logits[np.arange(len(logits)), valid.sum(1) - 1], tensors["logits_last_row_of_each_sample"])
    np.testing.assert_allclose(value, tensors["loss"], rtol=1e-5)  # the reference's own distance to float64 is 1e-6
    ours = golden_rows.torch_tensors(grads)
    norms = [np.linalg.norm(ours[key]) for key in config["grad_norm_names"]]
    np.testing.assert_allclose(norms, tensors["grad_norms"], rtol=1e-3)
    for key in set(ours) - set(config["grad_norm_names"]):  # no part in this case: a clip's positions in an image
        assert not ours[key].any(), key
    for key, expected in tensors.items():
        if key.startswith("grad."):
            close(ours[key[5:]], expected)


def same_labels(stream: decoder.Stream, expected: np.ndarray) -> None:
    """Each position's target, where it has one, is the reference's label of the next."""
    labels = np.where(np.asarray(stream.weights) > 0, np.asarray(stream.targets), IGNORED)
    np.testing.assert_array_equal(labels[:, :-1], expected[:, 1:])


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", INTERNVL_TRAINED)
def test_internvl_training_equals_the_reference(golden: Any, load_model: Callable[[str], hico.HiCo], name: str) -> None:
    """Loss and the gradient of every parameter; the tower in eval mode, as recorded."""
    case = golden.case("I_internvl_hico", name)
    config, tensors, model = case["config"], golden.tensors(case["file"]), load_model(case["config"]["checkpoint"])
    batch = golden_rows.internvl_batch_of(golden, name, model.config.geometry())
    (value, (visual, logits, _, _)), grads = learn(model, batch)
    for b, count in enumerate(config["frames_per_row"]):
        first, tokens = sum(config["frames_per_row"][:b]), config["tokens_per_frame"]
        expected = tensors["vit_embeds"][first : first + count].reshape(-1, visual.shape[-1])
        if count:
            close(visual[b, : count * tokens], expected)
    for b, real in enumerate(tensors["attention_mask"].astype(bool)):
        for key in ("logits", "logits_tail"):
            if key in tensors:
                expected = tensors[key][b][real] if key == "logits" else tensors[key][b]
                close(logits[b, : real.sum()][-len(expected) :], expected)
    np.testing.assert_allclose(value, tensors["loss"], rtol=1e-5)
    ours = golden_rows.torch_tensors(grads)
    recorded = config["param_grad_norms"]
    assert set(ours) == set(recorded)
    norms = [np.linalg.norm(ours[key].astype(np.float64)) for key in recorded]
    np.testing.assert_allclose(norms, list(recorded.values()), rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(norms), tensors["grad_norm_total"], rtol=1e-4)
    for key, expected in tensors.items():
        if key.startswith("grad."):
            close(ours[key[5:]], expected)


BYTES = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)


def test_every_byte_becomes_the_float_of_the_reference() -> None:
    """Under jit, because compilers fuse; bfloat16 takes another way and must round to the same."""
    expected = image.normalize(BYTES)
    for dtype in (jnp.float32, jnp.bfloat16):
        got = jax.jit(hico.normalize, static_argnums=1)(BYTES, dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, jnp.asarray(expected).astype(dtype))
    floats = jnp.linspace(-2, 2, 6).reshape(2, 3)
    np.testing.assert_array_equal(hico.normalize(floats, jnp.float32), floats)


def test_eight_devices_answer_like_one() -> None:
    """Encoding, prefill with a drop, and decoding, on meshes that split rows, weights, heads and the row itself."""
    schedule = DropSchedule("attention", (2,), (1.0, 0.5))
    config = dataclasses.replace(registry.model_config("nano"), drop=schedule)
    model, geometry = config.build(rngs=nnx.Rngs(0)), config.geometry()
    batch = Batch.fake(geometry, rows=4, clips=3, text=16, vocab=512)
    batch = dataclasses.replace(batch, drop=layout.plan_drop(batch, geometry.drop, training=False))
    settings = GenerationConfig(max_new_tokens=4, eos=())
    visual = _encode(model, batch.clips, batch.images)
    made = generate.generate(model, (batch, visual), settings)
    assert np.ptp(made.ids) > 0  # equal answers say something
    for sizes in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=2, fsdp=2, sequence=2)):
        mesh = make_mesh(sizes)
        graph, state = nnx.split(model)
        spread = nnx.merge(graph, jax.device_put(state, shardings(state, mesh)))
        with jax.set_mesh(mesh):
            placed = jax.device_put(batch, batch_shardings(batch, mesh))
            seen = _encode(spread, placed.clips, placed.images)
            again = generate.generate(spread, (placed, seen), settings)
        assert len(seen.sharding.device_set) == 8
        np.testing.assert_allclose(seen, visual, atol=1e-5)  # float32 sums in another order
        np.testing.assert_array_equal(again.ids, made.ids)
