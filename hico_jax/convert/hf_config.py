"""Translate `config.json` of the reference to `HiCoConfig` and back.

What `config.json` cannot say, because the reference keeps it in code, goes under two keys:

    vision_config   a tower that is not the published one: image_size, patch_size, hidden_size,
                    num_hidden_layers (nominal: before `mm_vision_select_layer` cuts the last ones off),
                    num_attention_heads, num_frames, mlp_ratio
    hico_jax        our own, absent when everything is as published: tokens_per_frame, tokens_per_image,
                    pretrain_grid, pretrain_frames, faithful_dtype, dtype (of activations)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from hico_jax.batch import DropSchedule
from hico_jax.models.compress.tome import ToMeConfig
from hico_jax.models.hico import HiCoConfig
from hico_jax.models.llm.qwen2 import Qwen2Config
from hico_jax.models.vision.umt import UMTConfig

MODEL_TYPES = ("llava_qwen", "llava_qwen_flash", "videochat_flash_qwen")
PROJECTOR = "tome16_mlp_hd64"
NOMINAL_BLOCKS = 24  # of the published UMT-L

# Tower names are matched by substring, in this order; the first hit decides. None: not built here.
TOWERS: tuple[tuple[str, int | None], ...] = (
    ("openai", None),
    ("laion", None),
    ("ShareGPT4V", None),
    ("clip", None),
    ("siglip", None),
    ("internvideo2", None),
    ("umt-hd", 448),
    ("umt", 224),
)

ACTIVATIONS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}

# What the reference's code asks of its configuration besides our choices (some keys only have to exist).
DEFAULTS: dict[str, Any] = {
    "architectures": ["LlavaQwenForCausalLM_Flash"],
    "attention_dropout": 0.0,
    "frame_aspect_ratio": "square",
    "frame_grid_pinpoints": None,
    "hidden_act": "silu",
    "image_aspect_ratio": "anyres_nopad",
    "image_crop_resolution": None,
    "image_split_resolution": None,
    "llm_compress_layer_list": [24],
    "llm_compress_type": "attention",
    "llm_image_token_ratio_list": [1.0, 0.5],
    "max_num_pixels": 14745600000,
    "min_slow_num_frames": 4,
    "mm_close_init": False,
    "mm_newline_position": "nothing",
    "mm_num_compress_latents": 128,
    "mm_num_compress_query_type": "learnable",
    "mm_patch_merge_type": "spatial_nopad",
    "mm_pos_num_frames": 8,
    "mm_projector_type": PROJECTOR,
    "mm_spatial_pool_mode": "bilinear",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "model_type": "llava_qwen_flash",
    "pos_skipping_range": 4096,
    "tokenizer_padding_side": "right",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "use_sliding_window": False,
    "vision_encode_type": "video_image",
    "vision_tower_pretrained": None,
}


def from_raw(raw: Mapping[str, Any]) -> HiCoConfig:
    """Our configuration of a reference checkpoint.

    Raises:
      ValueError: a model, tower or projector that is not built here, or a key that is missing; says which are.
    """
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"config.json has model_type {kind!r}, which is not supported yet; supported are {', '.join(MODEL_TYPES)}"
        )
    if raw.get("mm_projector_type", PROJECTOR) != PROJECTOR:
        raise ValueError(f"config.json has mm_projector_type {raw['mm_projector_type']!r}; supported is {PROJECTOR!r}")
    ours = _section(raw, "hico_jax")
    vision = _vision(raw, ours)
    if raw.get("mm_hidden_size", vision.embed_dim) != vision.embed_dim:
        raise ValueError(
            f"config.json has mm_hidden_size {raw['mm_hidden_size']} but its tower is {vision.embed_dim} wide; "
            "correct it, or give the tower's sizes under vision_config"
        )
    drop = DropSchedule()
    if raw.get("mm_llm_compress"):
        drop = DropSchedule(
            kind=_need(raw, "llm_compress_type"),
            layers=tuple(_need(raw, "llm_compress_layer_list")),
            ratios=tuple(float(r) for r in _need(raw, "llm_image_token_ratio_list")),
        )
    return HiCoConfig(
        vision=vision,
        compressor=ToMeConfig(**{f.name: ours[f.name] for f in dataclasses.fields(ToMeConfig) if f.name in ours}),
        llm=Qwen2Config.from_hf(raw),
        drop=drop,
        max_length=raw.get("tokenizer_model_max_length") or HiCoConfig.max_length,
        dtype=ours.get("dtype", ACTIVATIONS.get(str(raw.get("torch_dtype") or raw.get("dtype")), HiCoConfig.dtype)),
    )


def _vision(raw: Mapping[str, Any], ours: Mapping[str, Any]) -> UMTConfig:
    name = str(_need(raw, "mm_vision_tower"))
    image_px = next((px for part, px in TOWERS if part in name), None)
    if image_px is None:
        known = ", ".join(f"{part!r} ({px} px)" for part, px in TOWERS if px)
        raise ValueError(
            f"config.json has mm_vision_tower {name!r}; this tower is not supported yet. "
            f"Supported are names that contain {known}."
        )
    given = _section(raw, "vision_config")
    nominal = given.get("num_hidden_layers", NOMINAL_BLOCKS)
    select = raw.get("mm_vision_select_layer", -2)
    return UMTConfig(
        image_px=given.get("image_size", image_px),
        patch_px=given.get("patch_size", UMTConfig.patch_px),
        embed_dim=given.get("hidden_size", UMTConfig.embed_dim),
        num_blocks=nominal + select + 1 if select < 0 else nominal,
        num_heads=given.get("num_attention_heads", UMTConfig.num_heads),
        mlp_ratio=given.get("mlp_ratio", UMTConfig.mlp_ratio),
        frames_per_clip=raw.get("mm_local_num_frames") or given.get("num_frames", UMTConfig.frames_per_clip),
        pretrain_grid=ours.get("pretrain_grid", UMTConfig.pretrain_grid),
        pretrain_frames=ours.get("pretrain_frames", UMTConfig.pretrain_frames),
    )


def to_raw(config: HiCoConfig, raw: Mapping[str, Any] | None = None, *, torch_dtype: str = "float32") -> dict[str, Any]:
    """`config.json` of a model: `raw` (as it was loaded) wherever that still says the same, unknown keys included.

    Raises:
      ValueError: an architecture whose `config.json` is not known.
    """
    if not (isinstance(config.vision, UMTConfig) and isinstance(config.compressor, ToMeConfig)):
        raise ValueError(
            f"cannot write config.json of {type(config.vision).__name__} with {type(config.compressor).__name__}; "
            "only UMT towers with ToMe have a form the reference knows"
        )
    out = copy.deepcopy(dict(DEFAULTS if raw is None else raw))
    before = None if raw is None else from_raw(raw)
    if before is not None and _same(before, config) and torch_dtype == out.get("torch_dtype", out.get("dtype")):
        return out
    vision, llm, drop = config.vision, config.llm, config.drop
    side = vision.image_px
    if before is None or before.vision.image_px != side:
        out["image_grid_pinpoints"] = [[i * side, j * side] for i in range(1, 7) for j in range(1, 7)]
        out["mm_vision_tower"] = "umt-hd-large" if side == 448 else "umt-large"
    select = out.setdefault("mm_vision_select_layer", -2)
    out |= {
        "hidden_size": llm.embed_dim,
        "intermediate_size": llm.mlp_dim,
        "max_position_embeddings": llm.max_positions,
        "mm_hidden_size": vision.embed_dim,
        "mm_llm_compress": bool(drop.num_stages),
        "mm_local_num_frames": vision.frames_per_clip,
        "num_attention_heads": llm.num_heads,
        "num_hidden_layers": llm.num_layers,
        "num_key_value_heads": llm.num_kv_heads,
        "rms_norm_eps": llm.norm_eps,
        "rope_theta": llm.rope_theta,
        "tie_word_embeddings": llm.tied,
        "tokenizer_model_max_length": config.max_length,
        "torch_dtype": torch_dtype,
        "vocab_size": llm.vocab_size,
    }
    if out.get("initializer_range", 0.02) != llm.init_std or raw is None:
        out["initializer_range"] = llm.init_std
    if "head_dim" in out or llm.head_dim * llm.num_heads != llm.embed_dim:
        out["head_dim"] = llm.head_dim
    if drop.num_stages:
        out |= {
            "llm_compress_type": drop.kind,
            "llm_compress_layer_list": list(drop.layers),
            "llm_image_token_ratio_list": list(drop.ratios),
        }
    for key in ("vision_config", "hico_jax"):
        out.pop(key, None)
    if _vision(out, {}) != dataclasses.replace(
        vision, remat=False, pretrain_grid=UMTConfig.pretrain_grid, pretrain_frames=UMTConfig.pretrain_frames
    ):
        out["vision_config"] = {
            "image_size": side,
            "patch_size": vision.patch_px,
            "hidden_size": vision.embed_dim,
            "num_hidden_layers": vision.num_blocks - select - 1 if select < 0 else vision.num_blocks,
            "num_attention_heads": vision.num_heads,
            "num_frames": vision.frames_per_clip,
            "mlp_ratio": vision.mlp_ratio,
        }
    own = dataclasses.asdict(config.compressor) | {
        "pretrain_grid": vision.pretrain_grid,
        "pretrain_frames": vision.pretrain_frames,
        "dtype": config.dtype,
    }
    usual = dataclasses.asdict(ToMeConfig()) | {
        "pretrain_grid": UMTConfig.pretrain_grid,
        "pretrain_frames": UMTConfig.pretrain_frames,
        "dtype": ACTIVATIONS.get(torch_dtype, HiCoConfig.dtype),
    }
    changed = {key: value for key, value in own.items() if value != usual[key]}
    if changed:
        out["hico_jax"] = changed
    assert _same(from_raw(out), config), (out, config)
    return out


def _same(a: HiCoConfig, b: HiCoConfig) -> bool:
    """Equal but for what is chosen anew at every run."""

    def plain(config: HiCoConfig) -> HiCoConfig:
        vision = dataclasses.replace(config.vision, remat=False)
        return dataclasses.replace(config, vision=vision, llm=dataclasses.replace(config.llm, remat=False))

    return plain(a) == plain(b)


def _need(raw: Mapping[str, Any], key: str) -> Any:
    if raw.get(key) is None:
        raise ValueError(f"config.json lacks {key}; it is not the configuration of a whole VideoChat-Flash model")
    return raw[key]


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json has {key} {value!r}; it must be an object")
    return value
