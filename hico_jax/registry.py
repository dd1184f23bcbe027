"""What exists: towers, compressors, language models, and the released combinations of them.

Adding an architecture is one file plus one line here. A configuration class has a class attribute `arch`
(its key below), a method `build(rngs)`, and its module holds `VARIANTS` (named configurations, `tiny` among
them) and `TORCH_NAMES` (the table of `convert/rules.py`).
"""

from __future__ import annotations

import dataclasses
import difflib
from types import ModuleType

from hico_jax.batch import DropSchedule
from hico_jax.models import hico
from hico_jax.models.compress import keep, pick, pool, tome
from hico_jax.models.llm import internlm2, qwen2
from hico_jax.models.vision import internvideo2, internvit, umt

VISION: dict[str, ModuleType] = {"umt": umt, "internvideo2": internvideo2, "internvit": internvit}
COMPRESSOR: dict[str, ModuleType] = {"tome": tome, "none": keep, "pool": pool, "pick": pick}
LLM: dict[str, ModuleType] = {"qwen2": qwen2, "internlm2": internlm2}
PARTS = {"vision": VISION, "compressor": COMPRESSOR, "llm": LLM}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One named model: its parts, where its weights are published, and what to say of it."""

    vision: tuple[str, str]  # key of VISION, name in its VARIANTS
    compressor: tuple[str, str]
    llm: tuple[str, str]
    tokenizer: str  # kind of tokenizer file it reads
    source: str = ""  # published repository; empty: made here
    licence: str = ""  # as its model card says
    note: str = ""
    max_length: int = 32768  # longest row after visual expansion
    drop: DropSchedule = dataclasses.field(default_factory=DropSchedule)
    dtype: str = "bfloat16"
    projector: str = "mlp"


def _released(vision: str, llm: str, source: str, note: str) -> Entry:
    return Entry(
        ("umt", vision), ("tome", "tome16"), ("qwen2", llm), "qwen2", f"OpenGVLab/{source}", "Apache-2.0", note
    )


def _internvl(compressor: str, source: str, note: str) -> Entry:
    return Entry(
        ("internvit", "internvit-300m"), ("tome", compressor), ("internlm2", "internlm2.5-7b"), "internlm2",
        f"OpenGVLab/{source}", "MIT", note, max_length=65536, projector="norm_mlp",
    )  # fmt: skip


def _toy(vision: str, note: str) -> Entry:
    return Entry(
        ("umt", vision), ("tome", "nano"), ("qwen2", "nano"), "nano", note=note, max_length=49152, dtype="float32"
    )


def _hico_nano(vision: str, note: str) -> Entry:
    return Entry(("umt", vision), ("tome", "tome16"), ("qwen2", "hico-nano"), "nano", note=note, max_length=262144)


MODELS: dict[str, Entry] = {
    "umt_hd_qwen2_5_1_5b": _released(
        "umt-hd-large", "qwen2.5-1.5b", "VideoChat-Flash-Qwen2_5-2B_res448", "The smallest released model."
    ),
    "umt_qwen2_7b": _released("umt-large", "qwen2-7b", "VideoChat-Flash-Qwen2-7B_res224", "The result of stage 3."),
    "umt_hd_qwen2_7b": _released(
        "umt-hd-large", "qwen2-7b", "VideoChat-Flash-Qwen2-7B_res448",
        "umt_qwen2_7b after stage 4: the same tower at twice the resolution, language model untouched.",
    ),
    "umt_qwen2_5_7b_1m": _released(
        "umt-large", "qwen2.5-7b-1m", "VideoChat-Flash-Qwen2_5-7B-1M_res224",
        "For films of hours: its language model knows positions up to a million.",
    ),
    "internvideo2_qwen2_5_7b": Entry(
        ("internvideo2", "internvideo2-1b"), ("tome", "tome16"), ("qwen2", "qwen2.5-7b"), "qwen2",
        "OpenGVLab/VideoChat-Flash-Qwen2_5-7B_InternVideo2-1B", "Apache-2.0", "A tower of a billion parameters.",
    ),
    "internvl_hico_r16": _internvl(
        "tome16", "InternVL_2_5_HiCo_R16", "Frames are encoded alone and merged in fours; the base of InternVideo2.5."
    ),
    "internvl_hico_r64": _internvl("tome64", "InternVL_2_5_HiCo_R64", "The same with 64 tokens a frame."),
    "nano": _toy("nano", "Trains on a laptop CPU in minutes: `hico demo --train`."),
    "nano_hd": _toy("nano-hd", "nano at 80 pixels, for its stage 4."),
    "hico_nano": _hico_nano("hico-nano", "11 million parameters; `launch/nano.sh` trains it on one GPU."),
    "hico_nano_hd": _hico_nano("hico-nano-hd", "hico_nano at 112 pixels, for its stage 4."),
    "tiny": Entry(
        ("umt", "tiny"), ("tome", "tiny"), ("qwen2", "tiny"), "nano", note="For tests.", max_length=512, dtype="float32"
    ),
}  # fmt: skip


def entry(name: str) -> Entry:
    """The entry of a named model.

    Raises:
      ValueError: no such name; the nearest one is named.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known models are {', '.join(MODELS)}"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return MODELS[name]


def model_config(name: str) -> hico.HiCoConfig:
    """The whole configuration of a named model.

    Example:
      >>> model_config("umt_qwen2_7b").geometry().tokens_per_clip
      64
    """
    found = entry(name)
    return hico.HiCoConfig(
        vision=VISION[found.vision[0]].VARIANTS[found.vision[1]],
        compressor=COMPRESSOR[found.compressor[0]].VARIANTS[found.compressor[1]],
        llm=LLM[found.llm[0]].VARIANTS[found.llm[1]],
        drop=found.drop,
        max_length=found.max_length,
        dtype=found.dtype,
        projector=found.projector,
    )


def config_class(part: str, arch: str) -> type:
    """The configuration class of an architecture, for `part` in vision, compressor, llm.

    Raises:
      ValueError: no such architecture.
    """
    if part not in PARTS or arch not in PARTS[part]:
        raise ValueError(f"{part}.arch is {arch!r}; it must be one of {', '.join(PARTS.get(part, {}))}")
    return type(PARTS[part][arch].VARIANTS["tiny"])
