"""Every kind of file that weights are published in, as tensors under the names of `TORCH_NAMES`.

In: a folder or a file. Out: `Tensors`, still on disk. Whole models keep their names; the raw encoder files, stage-1
projector files and plain language models are given the names they have inside a whole model.
"""

from __future__ import annotations

import json
import os
import pathlib
import re

import ml_dtypes
import numpy as np

from hico_jax.convert import pickles, safetensors_io
from hico_jax.convert.safetensors_io import Entry, Tensors

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


def open_any(source: str | os.PathLike[str], *, allow_pickle: bool = False, num_blocks: int | None = None) -> Tensors:
    """The tensors of a file or folder, safetensors first. Of a raw encoder, only the first `num_blocks` blocks.

    Raises:
      ValueError: nothing to read, a damaged file, or pickled files without `allow_pickle`.
    """
    source = pathlib.Path(source)
    if source.is_dir() and not any((source / n).is_file() for n in (safetensors_io.INDEX, safetensors_io.SINGLE)):
        found = [source / n for n in (BIN_INDEX, BIN, "mm_projector.bin") if (source / n).is_file()]
    else:
        found = [source] if source.suffix in PICKLED and source.is_file() else []
    if not found:
        return renamed(safetensors_io.open_tensors(source), num_blocks)
    if not allow_pickle:
        raise ValueError(
            f"{found[0]} is a pickled file, which can hold code; pass --allow-pickle to read its tensors (its code is "
            "never run), or save it as safetensors"
        )
    if found[0].name != BIN_INDEX:
        return renamed(Tensors(pickles.read_pickle(found[0])), num_blocks)
    return renamed(Tensors(_pickled_index(found[0])), num_blocks)


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


def renamed(tensors: Tensors, num_blocks: int | None = None) -> Tensors:
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
            return Tensors({name: entry for name, entry in entries.items() if _exists(name, num_blocks)})
    return tensors


def _exists(name: str, num_blocks: int | None) -> bool:
    """Encoder files hold blocks that the models do not have; the reference's loaders leave them out."""
    found = re.match(rf"{re.escape(_TOWER)}\.(?:encoder\.)?blocks\.(\d+)\.", name)
    return found is None or num_blocks is None or int(found[1]) < num_blocks


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
