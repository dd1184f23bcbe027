"""Every kind of file that weights are published in, as tensors under the names of `TORCH_NAMES`.

In: a folder or a file. Out: `Tensors`, still on disk. Whole models keep their names; the raw encoder files, stage-1
projector files and plain language models are given the names they have inside a whole model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hico_jax.convert import pickles, safetensors_io
from hico_jax.convert.safetensors_io import Entry, Tensors
from hico_jax.models.vision import internvideo2

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLED = (".bin", ".pt", ".pth")
_TOWER = "model.vision_tower.vision_tower"

# A file is of the first kind whose mark it has and whose foreign mark it lacks: (mark, renames). A name that no
# rename matches is not of the model, as the reference's loaders hold too (heads, decoders, blocks beyond the last).
RAW: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (  # UMT-L_f4_vision.pt
        r"encoder\.patch_embed\.proj\.weight",
        (
            (r"encoder\.norm\.(weight|bias)", rf"{_TOWER}.encoder.vision_layernorm.\1"),
            (r"(encoder\.(patch_embed|blocks)\..*)", rf"{_TOWER}.\1"),
        ),
    ),
    (  # InternVideo2-1B_f4_vision.pt
        r"(img_pos_embed|pos_embed)",
        ((r"((cls_token|pos_embed|img_pos_embed)|(patch_embed|blocks)\..*)", rf"{_TOWER}.\1"),),
    ),
    (r"embeddings\.class_embedding", ((r"((embeddings|encoder)\..*)", r"vision_model.\1"),)),  # InternViT
    (  # InternLM2 and InternLM2.5
        r"model\.tok_embeddings\.weight",
        ((r"(model\..*|output\.weight)", r"language_model.\1"),),
    ),
)


def open_any(source: str | os.PathLike[str], *, allow_pickle: bool = False, vision: Any = None) -> Tensors:
    """The tensors of a file or folder, safetensors first.

    A raw encoder becomes what the tower `vision` (a configuration) takes: only the blocks that it has, and learned
    positions stretched to its frames and grid.

    Raises:
      ValueError: nothing to read, a damaged file, or pickled files without `allow_pickle`.
    """
    source = pathlib.Path(source)
    if source.is_dir() and not any((source / n).is_file() for n in (safetensors_io.INDEX, safetensors_io.SINGLE)):
        found = [source / n for n in (BIN_INDEX, BIN, "mm_projector.bin") if (source / n).is_file()]
    else:
        found = [source] if source.suffix in PICKLED and source.is_file() else []
    if not found:
        return renamed(safetensors_io.open_tensors(source), vision)
    if not allow_pickle:
        raise ValueError(
            f"{found[0]} is a pickled file, which can hold code; pass --allow-pickle to read its tensors (its code is "
            "never run), or save it as safetensors"
        )
    if found[0].name != BIN_INDEX:
        return renamed(Tensors(pickles.read_pickle(found[0])), vision)
    return renamed(Tensors(_pickled_index(found[0])), vision)


def _pickled_index(path: pathlib.Path) -> dict[str, Entry]:
    try:
        files = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: no JSON with a weight_map of names to files ({error})") from error
    entries: dict[str, Entry] = {}
    for file in files:
        if not isinstance(file, str) or file != os.path.basename(file) or not (path.parent / file).is_file():
            raise ValueError(f"{path} names {file!r}, which is missing; fetch it, or the whole folder, again")
        entries |= pickles.read_pickle(path.parent / file)
    return entries


def renamed(tensors: Tensors, vision: Any = None) -> Tensors:
    """Under the names of a whole model; raw files lose what their loaders leave out.

    A file that holds a whole model, or a part under its full names, is returned as it is.
    """
    if any(name.startswith(("model.vision_tower.", "vision_model.", "model.embed_tokens.")) for name in tensors):
        return tensors
    for mark, renames in RAW:
        if any(re.fullmatch(mark, name) for name in tensors):
            entries = {}
            for name, entry in tensors.items_on_disk():
                for pattern, to in renames:
                    if re.fullmatch(pattern, name):
                        entries[re.sub(rf"\A{pattern}\Z", to, name)] = entry
                        break
            blocks = None if vision is None else vision.num_blocks
            left = Tensors({name: entry for name, entry in entries.items() if _exists(name, blocks)})
            return left if vision is None else Stretched.to_fit(left, vision)
    return tensors


def _exists(name: str, num_blocks: int | None) -> bool:
    """Encoder files hold blocks that the models do not have; the reference's loaders leave them out."""
    found = re.match(rf"{re.escape(_TOWER)}\.(?:encoder\.)?blocks\.(\d+)\.", name)
    return found is None or num_blocks is None or int(found[1]) < num_blocks


POSITIONS = {  # name -> (of clips, of single frames)
    "internvideo2": (f"{_TOWER}.pos_embed", f"{_TOWER}.img_pos_embed"),
    "internvit": (None, "vision_model.embeddings.position_embedding"),
}
Size = tuple[int, int]  # frames, patches on a side


class Stretched(Tensors):
    """Tensors of which learned tables of positions are stretched when they are read."""

    def __init__(self, tensors: Tensors, changes: Mapping[str, tuple[Size, Size]]) -> None:
        super().__init__(tensors.entries)
        self._stored, self._changes = tensors, changes
        for name, (_, (frames, grid)) in changes.items():
            entry = self.entries[name]
            self.entries[name] = dataclasses.replace(entry, shape=(1, 1 + frames * grid**2, entry.shape[-1]))
        self.notes = tuple(
            f"positions stretched: {name} from {a[0]} frames of {a[1]} x {a[1]} patches to {b[0]} of {b[1]} x {b[1]}"
            for name, (a, b) in changes.items()
        )

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._stored[name]
        if name not in self._changes:
            return tensor
        made = internvideo2.stretch_positions(tensor[0].astype(np.float32), *self._changes[name])
        return made[None].astype(tensor.dtype)

    @classmethod
    def to_fit(cls, tensors: Tensors, vision: Any) -> Tensors:
        """With the tables that another number of frames or another frame size asks to stretch."""
        of_clip, of_frame = POSITIONS.get(vision.arch, (None, None))
        new, changes, grid = (vision.frames_per_clip, vision.image_px // vision.patch_px), {}, None
        if of_frame in tensors.entries:
            grid = _side(_rows(tensors, of_frame))
            if grid and grid != new[1]:
                changes[of_frame] = ((1, grid), (1, new[1]))
        if of_clip in tensors.entries:
            rows = _rows(tensors, of_clip)
            sides = (grid, new[1], _side(rows / new[0]))  # of the images, if it has their table; else guessed
            old = next(((rows // g**2, g) for g in sides if g and not rows % g**2), new)
            if old != new:
                changes[of_clip] = (old, new)
        return cls(tensors, changes) if changes else tensors


def _rows(tensors: Tensors, name: str) -> int:
    """How many places a table has, besides the class token's."""
    return tensors.entries[name].shape[1] - 1 if len(tensors.entries[name].shape) == 3 else 0


def _side(places: float) -> int | None:
    side = round(places**0.5) if places > 0 else 0
    return side if side and side * side == places else None


def check_finite(name: str, tensor: np.ndarray) -> None:
    """A checkpoint with a NaN in it answers nonsense and trains to nothing, so it is refused.

    Raises:
      ValueError: a number is infinite or not one.
    """
    exponents = {
        np.dtype(np.float32): (np.uint32, 0x7F800000),
        np.dtype(np.float16): (np.uint16, 0x7C00),
        np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    }
    if tensor.dtype in exponents:  # on the bits: several times faster than `isfinite` of a half type
        bits, mask = exponents[tensor.dtype]
        bad = (tensor.view(bits) & bits(mask)) == bits(mask)
    elif tensor.dtype == np.float64:
        bad = ~np.isfinite(tensor)
    else:
        return
    if bad.any():
        raise ValueError(
            f"{name} has {int(bad.sum())} numbers of {tensor.size} that are NaN or infinite; fetch the checkpoint "
            "again, or take an earlier one"
        )
