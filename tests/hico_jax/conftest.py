"""Language models filled with recorded weights, drop plans made the slow way, and a tiny model to ask about a film."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline import video
from data_pipeline.frames import Sampling
from data_pipeline.tokenizer import Tokenizer, train_bpe
from data_pipeline.world.texts import corpus
from hico_jax import registry
from hico_jax.batch import DropPlan, DropSchedule
from hico_jax.film import Viewer
from hico_jax.models.hico import HiCo
from hico_jax.models.llm import qwen2
from hico_jax.models.llm.decoder import Stream

GOLDEN_LLM = qwen2.Qwen2Config(
    vocab_size=512, embed_dim=64, mlp_dim=128, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=16
)


def leaf_of(model: Any, path: str) -> Any:
    """The parameter a rule's path names, below `llm/`."""
    for part in path.split("/")[1:]:
        model = getattr(model, part)
    return model


def fill(model: qwen2.Qwen2, tensors: dict[str, np.ndarray]) -> qwen2.Qwen2:
    """Load torch tensors through the module's own table."""
    config = model.config
    for rule in qwen2.TORCH_NAMES:
        if rule.optional and config.tied:
            continue
        names = [rule.torch.replace("{i}", str(i)) for i in range(config.num_layers)] if rule.stacked else [rule.torch]
        ours = [rule.to_ours(tensors[name], config.torch_sizes) for name in names]
        value = np.stack(ours) if rule.stacked else ours[0]
        parameter = leaf_of(model, rule.path)
        assert parameter.shape == value.shape, rule
        parameter[...] = jnp.asarray(value)
    return model


@pytest.fixture(scope="session")
def golden_llm(golden: Any) -> Callable[[bool], qwen2.Qwen2]:
    """Group E's language model; the argument says whether the head is tied."""
    tensors = golden.tensors("E_llm_weights.safetensors")
    made: dict[bool, qwen2.Qwen2] = {}

    def get(tied: bool = False) -> qwen2.Qwen2:
        if tied not in made:
            made[tied] = fill(dataclasses.replace(GOLDEN_LLM, tied=tied).build(rngs=nnx.Rngs(0)), tensors)
        return made[tied]

    return get


def evenly(n: int, k: int) -> list[int]:
    """torch's integer linspace(0, n - 1, k), in exact arithmetic where the reference uses a fused product."""
    if k <= 1:
        return [0] * k
    step = (n - 1) / (k - 1)
    back = [float(Fraction(n - 1) - Fraction(step) * (k - 1 - i)) for i in range(k)]
    return [int(i * step) if i < k // 2 else int(back[i]) for i in range(k)]


def plan_by_hand(stream: Stream, schedule: DropSchedule, *, training: bool, margin: int = 0) -> DropPlan:
    """A `DropPlan` by loops over rows and segments, independent of `data_pipeline`."""
    slots, segments = np.asarray(stream.slots), np.asarray(stream.segments)
    labelled = np.zeros(slots.shape, bool) if stream.labelled is None else np.asarray(stream.labelled)
    rows, num_segments = len(slots), max(1, int(segments.max()))
    survives = np.full(slots.shape, 127, np.int8)
    keep = np.zeros((rows, num_segments, schedule.num_stages), np.int32)
    asked = [0]
    for b in range(rows):
        count = 0
        for r in range(num_segments):
            (mine,) = np.nonzero(segments[b] == r + 1)
            visual = mine[slots[b, mine] >= 0]
            marks = labelled[b, mine]
            asks = int((~marks & np.roll(marks, -1)).sum())
            count += asks
            alive, now = visual, len(visual)
            survives[b, visual] = schedule.num_uniform
            for s, kept in enumerate(schedule.kept(len(visual))):
                if s < schedule.num_uniform:
                    chosen = evenly(now, kept)
                    survives[b, np.delete(alive, chosen)] = s
                    alive, now = alive[chosen], kept
                elif not training or asks:
                    now = kept
                keep[b, r, s] = now
        asked.append(count)
    text = ((segments > 0) & (slots < 0)).sum(1)
    return DropPlan(
        survives=jnp.asarray(survives),
        keep=jnp.asarray(keep),
        labelled=jnp.asarray(labelled),
        lengths=tuple(int(n) + margin for n in (text[:, None] + keep.sum(1)).max(0)),
        num_queries=max(asked) if training else 0,
    )


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., DropPlan]:
    return plan_by_hand


@pytest.fixture(scope="session")
def asked_model() -> HiCo:
    """A tiny whole model whose vocabulary holds every byte, filled with random numbers: no initializer is compiled.

    They are large enough for its answers to depend on the question and on the film.
    """
    config = registry.model_config("tiny")
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab_size=512))
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def value(keys: Any, leaf: Any) -> Any:
        if any(getattr(key, "key", None) == "scale" for key in keys):  # of a norm
            return jnp.ones(leaf.shape)
        return jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(value, state))


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    return train_bpe(corpus(), 400)


@pytest.fixture
def viewer(asked_model: HiCo, words: Tokenizer) -> Viewer:
    """Sees at most sixteen frames, two clips at a time."""
    return Viewer(asked_model, words, sampling=Sampling("dynamic_fps1", 8, 16, 4), clips_per_step=2)


@pytest.fixture(scope="session")
def noise_film(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Twelve seconds of one frame each; no two frames are alike."""
    colours = np.random.default_rng(1).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    frames = colours.repeat(16, 1).repeat(16, 2)
    return video.write_video(tmp_path_factory.mktemp("noise") / "film.mp4", frames, 1.0)
