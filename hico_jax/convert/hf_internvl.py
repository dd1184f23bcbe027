"""Translate `config.json` of the InternVL HiCo models to `HiCoConfig` and back.

Frames of a clip and tokens of a frame are constants of the reference's code: its R16 and R64 models have the same
`config.json`. They are read from the name of the folder ("R64"), from `_name_or_path`, or from our own section
`hico_jax` (tokens_per_frame, tokens_per_image, frames_per_clip, faithful_dtype, dtype, drop: video-level
compression), which `export` writes.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from hico_jax.batch import DropSchedule
from hico_jax.models.compress.tome import ToMeConfig
from hico_jax.models.hico import HiCoConfig
from hico_jax.models.llm.internlm2 import InternLM2Config
from hico_jax.models.vision.internvit import InternViTConfig

MODEL_TYPE = "internvl_chat"

# What the tower of a configuration must say for it to be the one that is built.
BUILT = {
    "qk_normalization": False, "qkv_bias": True, "norm_type": "layer_norm", "hidden_act": "gelu",
}  # fmt: skip
TOP = {"downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1}

DEFAULTS: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "auto_map": {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat_hico2.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat_hico2.InternVLChatModel",
    },
    "dynamic_image_size": False,
    "llm_config": {
        "architectures": ["InternLM2ForCausalLM"], "attn_implementation": "eager", "bias": False, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "model_type": "internlm2",
        "pad_token_id": 2,
    },
    "max_dynamic_patch": 1,
    "min_dynamic_patch": 1,
    "model_type": MODEL_TYPE,
    "template": "internvl2_5",
    "transformers_version": "4.40.1",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": False,
    "vision_config": {
        "architectures": ["InternVisionModel"], "attention_dropout": 0.0, "drop_path_rate": 0.1, "dropout": 0.0,
        "initializer_factor": 1.0, "initializer_range": 0.02, "model_type": "intern_vit_6b", "num_channels": 3,
        "use_flash_attn": True,
    } | BUILT,
} | TOP  # fmt: skip


def from_raw(raw: Mapping[str, Any], name: str = "") -> HiCoConfig:
    """Our configuration of an InternVL HiCo checkpoint in a folder of that name.

    Raises:
      ValueError: a part that is not built here, or a key that is missing.
    """
    llm_raw, vision_raw = (_part(raw, key) for key in ("llm_config", "vision_config"))
    if llm_raw.get("model_type", "internlm2") != "internlm2":
        raise ValueError(f"config.json has an llm_config of type {llm_raw['model_type']!r}; supported is 'internlm2'")
    for section, given, built in (("", raw, TOP), ("vision_config.", vision_raw, BUILT)):
        for key, value in built.items():
            if given.get(key, value) != value:
                raise ValueError(f"config.json has {section}{key} {given[key]!r}; only {value!r} is built")
    llm = InternLM2Config.from_hf(llm_raw)
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    missing = [f"vision_config.{key}" for key in needed if key not in vision_raw]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}; it is not the configuration of an InternVL model")
    ours = raw.get("hico_jax") or {}
    vision = InternViTConfig(
        image_px=vision_raw.get("image_size", raw.get("force_image_size", 448)),
        patch_px=vision_raw["patch_size"],
        width=vision_raw["hidden_size"],
        mlp_dim=vision_raw["intermediate_size"],
        num_blocks=vision_raw["num_hidden_layers"],
        num_heads=vision_raw["num_attention_heads"],
        norm_eps=vision_raw.get("layer_norm_eps", 1e-6),
        merge_heads=llm.num_heads,
        frames_per_clip=ours.get("frames_per_clip", InternViTConfig.frames_per_clip),
        drop_path=float(vision_raw.get("drop_path_rate", InternViTConfig.drop_path)),
    )
    merged = {f.name: ours[f.name] for f in dataclasses.fields(ToMeConfig) if f.name in ours}
    if "tokens_per_frame" not in merged and re.search(r"R64\b", f"{raw.get('_name_or_path', '')} {name}"):
        merged["tokens_per_frame"] = 64
    dtype = raw.get("torch_dtype") or raw.get("dtype")
    return HiCoConfig(
        vision=vision,
        compressor=ToMeConfig(**merged),
        llm=llm,
        drop=DropSchedule(**{key: _tuple(value) for key, value in ours.get("drop", {}).items()}),
        max_length=int(llm.max_positions * llm.rope_factor),
        dtype=ours.get("dtype", "float32" if dtype == "float32" else "bfloat16"),
        projector="norm_mlp",
    )


def to_raw(config: HiCoConfig, raw: Mapping[str, Any] | None = None, *, torch_dtype: str) -> dict[str, Any]:
    """`config.json` of an InternVL HiCo model: `raw` wherever that still says the same, unknown keys included."""
    out = copy.deepcopy(dict(DEFAULTS if raw is None else raw))
    vision, llm = config.vision, config.llm
    out["vision_config"] |= {
        "image_size": vision.image_px, "patch_size": vision.patch_px, "hidden_size": vision.width,
        "intermediate_size": vision.mlp_dim, "num_hidden_layers": vision.num_blocks,
        "num_attention_heads": vision.num_heads, "layer_norm_eps": vision.norm_eps,
    }  # fmt: skip
    out["llm_config"] |= {
        "hidden_size": llm.embed_dim, "intermediate_size": llm.mlp_dim, "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_heads, "num_key_value_heads": llm.num_kv_heads, "vocab_size": llm.vocab_size,
        "rms_norm_eps": llm.norm_eps, "max_position_embeddings": llm.max_positions, "tie_word_embeddings": llm.tied,
    }  # fmt: skip
    before = None if raw is None else from_raw(raw)
    if before is None or before.llm.rope_theta != llm.rope_theta:
        out["llm_config"]["rope_theta"] = llm.rope_theta
    if before is None or (before.llm.rope_kind, before.llm.rope_factor) != (llm.rope_kind, llm.rope_factor):
        scaling = {"factor": llm.rope_factor, "type": llm.rope_kind}
        out["llm_config"]["rope_scaling"] = None if llm.rope_kind == "default" else scaling
    out.setdefault("force_image_size", vision.image_px)
    if before is None or out.get("torch_dtype") != torch_dtype:
        out["torch_dtype"] = torch_dtype
        for part in ("llm_config", "vision_config"):
            if "torch_dtype" in out[part]:
                out[part]["torch_dtype"] = torch_dtype
    own = dataclasses.asdict(config.compressor) | {
        "drop": _plain(config.drop),
        "frames_per_clip": vision.frames_per_clip,
        "dtype": config.dtype,
    }
    usual = dataclasses.asdict(ToMeConfig()) | {
        "drop": _plain(DropSchedule()),
        "frames_per_clip": InternViTConfig.frames_per_clip,
        "dtype": "float32" if torch_dtype == "float32" else "bfloat16",
    }
    out.pop("hico_jax", None)
    changed = {key: value for key, value in own.items() if value != usual[key]}
    return out | ({"hico_jax": changed} if changed else {})


def _plain(drop: DropSchedule) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(drop).items()}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _part(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(raw.get(key), Mapping):
        raise ValueError(f"config.json has {key} {raw.get(key)!r}; it must be an object")
    return raw[key]
