"""What the model says of a few fixed training rows, beside what it should say.

In: a host batch and a way to turn ids to text. Out: an evaluation for the loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from hico_jax.batch import Batch
from hico_jax.generate import GenerationConfig, generate

Evaluate = Callable[[nnx.Module, int], Mapping[str, float]]


def samples(batch: Batch, decode: Callable[[Any], str], eos: tuple[int, ...]) -> Evaluate:
    """An evaluation that prints what the model says where each row has most to say, and counts exact answers.

    The longest supervised run, not the first: the reference also learns the newlines and marks of the prompt.
    """
    targets, slots = np.asarray(batch.targets), np.asarray(batch.slots)
    said_next = ~np.isin(targets, eos) & np.pad(slots[:, 1:] < 0, ((0, 0), (0, 1)), constant_values=True)
    supervised = (np.asarray(batch.segments) == 1) & (np.asarray(batch.weights) > 0) & said_next
    rows = np.flatnonzero(supervised.any(1))
    runs = [_longest_run(supervised[b]) for b in rows]
    wanted = [targets[b, run].tolist() for b, run in zip(rows, runs, strict=True)]
    starts = np.array([run.start for run in runs])
    prompts = jax.tree.map(lambda a: np.asarray(a)[rows], batch)
    inside = np.arange(supervised.shape[1]) <= starts[:, None]
    prompts = dataclasses.replace(prompts, segments=np.where(inside, prompts.segments, 0))

    def show(model: Any, step: int) -> dict[str, float]:
        settings = GenerationConfig(max_new_tokens=max(map(len, wanted)) + 1, eos=eos)  # and its end
        said = [_until(ids.tolist(), eos) for ids in generate(model, prompts, settings).ids]
        for ids, want in zip(said, wanted, strict=True):
            print(f"  step {step}: says {decode(ids).strip()!r}, expected {decode(want).strip()!r}", flush=True)
        return {"exact": sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)}

    return show if wanted else lambda model, step: {}


def _longest_run(mask: np.ndarray) -> slice:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    first = int(np.argmax(edges[1::2] - edges[::2]))
    return slice(int(edges[2 * first]), int(edges[2 * first + 1]))


def _until(ids: list[int], eos: tuple[int, ...]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in eos), len(ids))]
