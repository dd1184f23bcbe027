"""Recorded cases of whole models (group F) as batches of our own host code, and parameters under their torch names."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipeline import layout
from hico_jax import checkpoint
from hico_jax.batch import Batch, Geometry
from hico_jax.convert import load

ERRORS: dict[str, float] = {}  # the largest of each test that compared something; `pytest -v` prints them


def close(got: Any, expected: np.ndarray, most: float = 1e-4) -> None:
    """Within `most` of the largest value; float32 and float64 of the reference differ by 1e-5 of it."""
    got = np.asarray(got)
    assert got.shape == expected.shape
    error = float(np.abs(got - expected).max() / (np.abs(expected).max() or 1.0))
    name = os.environ.get("PYTEST_CURRENT_TEST", "").split(" (")[0]
    ERRORS[name] = max(error, ERRORS.get(name, 0.0))
    assert error <= most, f"off by {error:.2e} of the largest value"


def media_of(case: dict[str, Any], pixels: dict[str, np.ndarray]) -> list[tuple[str, Any, np.ndarray]]:
    """Modality, image size and uint8 frames `[T height width 3]` of every entry of a case's media."""
    found = []
    for entry in case["config"]["media"]:
        if entry["tensor"] == "zeros":
            frames = np.full((1, 224, 224, 3), 128, np.uint8)
        else:
            array = pixels[entry["tensor"]][_slice(entry["slice"].split(" ")[0])]
            frames = np.moveaxis(array.reshape(-1, *array.shape[-3:]), 1, -1)
        found.append((entry["modality"], entry["image_size"], frames))
    return found


def _slice(text: str) -> slice:
    first, _, last = text.strip("[]").partition(":")
    return slice(int(first), int(last) if last else int(first) + 1)


def rows_of(golden: Any, name: str, geometry: Geometry) -> list[layout.Row]:
    """The rows of a recorded case, laid out by our own host code. A prompt has no labels."""
    case = golden.case("F_full", name)
    tensors, media = golden.tensors(case["file"]), media_of(case, golden.tensors("pixels.safetensors"))
    rows = []
    for b, ids in enumerate(tensors["input_ids"]):
        real = tensors["attention_mask"][b].astype(bool) if "attention_mask" in tensors else np.ones(len(ids), bool)
        ids, labels = ids[real], tensors["labels"][b][real] if "labels" in tensors else None
        mine = [media.pop(0) for _ in range(max(1, int((ids < 0).sum())))]  # a text row has one that it does not use
        mine = [m for m in mine if m[0] != "text"]
        clips = [m[2].reshape(-1, 4, 224, 224, 3) for m in mine if m[0] == "video"]
        tiles = [m[2] for m in mine if m[0] == "image"]
        rows.append(
            layout.row(
                ids, labels, [_visual(m, geometry) for m in mine], geometry,
                clips=np.concatenate(clips) if clips else None, tiles=np.concatenate(tiles) if tiles else None,
            )
        )  # fmt: skip
    assert not media
    return rows


def batch_of(golden: Any, name: str, geometry: Geometry, **shape: Any) -> Batch:
    """A recorded case as one batch with its float pixels; `shape` goes to `layout.collate`."""
    batch = layout.collate(rows_of(golden, name, geometry), geometry, **shape)
    values = {name: (getattr(batch, name).astype(np.float32) - 128) / 64 for name in ("clips", "images")}
    return dataclasses.replace(batch, **values)


def internvl_row(golden: Any, name: str, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and pixels `[T 3 S S]` of a row of group I; a frame's run of context tokens is one placeholder."""
    case = golden.case("I_internvl_hico", name)
    config, tensors = case["config"], golden.tensors(case["file"])
    real = tensors["attention_mask"][b].astype(bool)
    ids = tensors["input_ids"][b][real]
    labels = tensors["labels"][b][real] if "labels" in tensors else np.full(len(ids), -100)
    context = ids == config["img_context_token_id"]
    starts = context & ~np.append(False, context[:-1])
    assert (labels[context] == -100).all()
    kept = ~context | starts
    video = golden.tensors("pixels.safetensors")["video224"].reshape(-1, 3, 224, 224)
    first, count = sum(config["frames_per_row"][:b]), config["frames_per_row"][b]
    pixels = canvas_pixels(config["pixels"], video)[first : first + count]
    return np.where(starts, -200, ids)[kept], labels[kept], pixels


def internvl_batch_of(golden: Any, name: str, geometry: Geometry) -> Batch:
    """A recorded case of group I as one batch with its float pixels, smaller than the tower's own."""
    rows, films = [], []
    for b in range(len(golden.case("I_internvl_hico", name)["config"]["frames_per_row"])):
        ids, labels, pixels = internvl_row(golden, name, b)
        seen = [layout.Visual.film(len(pixels), geometry, parts=len(pixels))] if len(pixels) else []
        rows.append(layout.row(ids, labels, seen, geometry))
        films.append(np.moveaxis(pixels, 1, -1).reshape(-1, geometry.frames_per_clip, *pixels.shape[2:], 3))
    clips = np.zeros((len(rows), max(map(len, films)), *films[0].shape[1:]), np.float32)
    for b, film in enumerate(films):
        clips[b, : len(film)] = film
    images = np.zeros((len(rows), 0, *clips.shape[3:]), np.float32)
    return dataclasses.replace(layout.collate(rows, geometry, pixels=False), clips=clips, images=images)


def _visual(entry: tuple[str, Any, np.ndarray], geometry: Geometry) -> layout.Visual:
    modality, size, frames = entry
    if modality == "video":
        return layout.Visual.film(len(frames), geometry)
    if len(frames) == 1:
        return layout.Visual.picture(1)
    across, down = round(size[0] / 224), round(size[1] / 224)
    return layout.Visual.picture(len(frames), (down, across))


def torch_tensors(model: Any) -> dict[str, np.ndarray]:
    """A model's parameters, or their gradients, under the reference's names."""
    config = model.config
    arrays = checkpoint.flatten(nnx.state(model))
    out: dict[str, np.ndarray] = {}
    for rule in load.rules(config):
        if rule.path not in arrays:
            continue
        array = np.asarray(arrays[rule.path])
        sizes = config.llm.torch_sizes if rule.path.startswith("llm/") else {"H": config.vision.num_heads}
        for i in range(array.shape[0] if rule.stacked else 1):
            source = array[i] if rule.stacked else array
            out[rule.torch.replace("{i}", str(i))] = rule.to_torch(source, sizes)
    return out


def filled(config: Any, rules: Any, tensors: dict[str, np.ndarray], *, ours: str, theirs: str, layers: int) -> Any:
    """A part of a model with recorded weights, by its own table of names; every tensor must be used.

    `ours` is the part's name in our paths, `theirs` the prefix that the recorded names lack.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    left, values = dict(tensors), {}
    leaves = load.by_path(state)
    for rule in rules:
        path = rule.path.removeprefix(f"{ours}/")
        if rule.optional and path not in leaves:
            continue
        leaf = leaves[path]
        sizes = rule.sizes(leaf.shape[1:] if rule.stacked else leaf.shape)
        found = [rule.to_ours(left.pop(name.removeprefix(theirs)), sizes) for name in rule.names(layers)]
        values[path] = jnp.asarray(np.stack(found) if rule.stacked else found[0])
        assert values[path].shape == leaf.shape, path
    assert not left, sorted(left)
    return nnx.merge(graph, load._fill(state, values))


def canvas_pixels(rule: dict[str, Any], video: np.ndarray) -> np.ndarray:
    """Group I's frames `[T 3 S S]`, made of the shared video by the manifest's rule."""
    count, size, made = len(video), rule["size"], []
    for t in range(rule["frames"]):
        a, b = video[t % count], video[(t + count // 2) % count]
        if t >= count:
            a, b = a[:, ::-1], b[:, ::-1]
        upper, lower = (np.concatenate([x, y[:, :, ::-1]], 2) for x, y in ((a, b), (b, a)))
        made.append(np.concatenate([upper, lower], 1)[:, :size, :size])
    return (np.stack(made).astype(np.float32) - 128) / 64
