"""Translate `config.json` of the reference to `HiCoConfig` and back.

What `config.json` cannot say, because the reference keeps it in code, goes under two keys:

    vision_config   a tower that is not the published one: image_size, patch_size, hidden_size,
                    num_hidden_layers (nominal: before `mm_vision_select_layer` cuts the last ones off),
                    num_attention_heads, num_frames, mlp_ratio
    hico_jax        our own, absent when everything is as published: tokens_per_frame, tokens_per_image,
                    pretrain_grid, pretrain_frames, faithful_dtype, dtype (of activations), drop_shares. PyTorch
                    programs pass over it: with drop_shares above 1 they choose the best of the whole row all the same

The InternVL models have another `config.json`: hico_jax/convert/hf_internvl.py.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from hico_jax.batch import DropSchedule
from hico_jax.convert import hf_internvl
from hico_jax.models.compress.tome import ToMeConfig
from hico_jax.models.hico import HiCoConfig
from hico_jax.models.llm.internlm2 import InternLM2Config
from hico_jax.models.llm.qwen2 import Qwen2Config
from hico_jax.models.vision.internvideo2 import InternVideo2Config
from hico_jax.models.vision.umt import UMTConfig

MODEL_TYPES = ("llava_qwen", "llava_qwen_flash", "videochat_flash_qwen")
PROJECTOR = "tome16_mlp_hd64"
NOMINAL_BLOCKS = {"umt": 24, "internvideo2": 40}  # of the published towers

# Tower names are matched by substring, in this order; the first hit decides. None: not built here.
TOWERS: tuple[tuple[str, tuple[type, int] | None], ...] = (
    ("openai", None),
    ("laion", None),
    ("ShareGPT4V", None),
    ("clip", None),
    ("siglip", None),
    ("internvideo2", (InternVideo2Config, 224)),
    ("umt-hd", (UMTConfig, 448)),
    ("umt", (UMTConfig, 224)),
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


OWN_VISION = ("pretrain_grid", "pretrain_frames", "image_positions")  # fields of a tower that go under "hico_jax"


def from_raw(raw: Mapping[str, Any], name: str = "") -> HiCoConfig:
    """Our configuration of a reference checkpoint. `name`, of its folder, tells what only the InternVL names tell.

    Raises:
      ValueError: a model, tower or projector that is not built here, or a key that is missing; says which are.
    """
    kind = raw.get("model_type")
    if kind == hf_internvl.MODEL_TYPE:
        return hf_internvl.from_raw(raw, name)
    if kind not in MODEL_TYPES:
        known = ", ".join((*MODEL_TYPES, hf_internvl.MODEL_TYPE))
        raise ValueError(f"config.json has model_type {kind!r}, which is not supported yet; supported are {known}")
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
            shares=ours.get("drop_shares", 1),
        )
    return HiCoConfig(
        vision=vision,
        compressor=ToMeConfig(**{f.name: ours[f.name] for f in dataclasses.fields(ToMeConfig) if f.name in ours}),
        llm=Qwen2Config.from_hf(raw),
        drop=drop,
        max_length=raw.get("tokenizer_model_max_length") or HiCoConfig.max_length,
        dtype=ours.get("dtype", ACTIVATIONS.get(str(raw.get("torch_dtype") or raw.get("dtype")), HiCoConfig.dtype)),
    )


def _vision(raw: Mapping[str, Any], ours: Mapping[str, Any]) -> UMTConfig | InternVideo2Config:
    name = str(_need(raw, "mm_vision_tower"))
    tower = next((found for part, found in TOWERS if part in name), None)
    if tower is None:
        known = ", ".join(f"{part!r} ({found[1]} px)" for part, found in TOWERS if found)
        raise ValueError(
            f"config.json has mm_vision_tower {name!r}; this tower is not supported yet. "
            f"Supported are names that contain {known}."
        )
    kind, image_px = tower
    given = _section(raw, "vision_config")
    nominal = given.get("num_hidden_layers", NOMINAL_BLOCKS[kind.arch])
    select = raw.get("mm_vision_select_layer", -2)
    names = {
        "image_size": "image_px", "patch_size": "patch_px", "hidden_size": "embed_dim",
        "num_attention_heads": "num_heads", "mlp_ratio": "mlp_ratio", "num_frames": "frames_per_clip",
    }  # fmt: skip
    sizes = {"image_px": image_px} | {mine: given[theirs] for theirs, mine in names.items() if theirs in given}
    if raw.get("mm_local_num_frames"):
        sizes["frames_per_clip"] = raw["mm_local_num_frames"]
    own = {key: ours[key] for key in OWN_VISION if key in ours and key in kind.__dataclass_fields__}
    return kind(num_blocks=nominal + select + 1 if select < 0 else nominal, **sizes, **own)


ROPE = ("rope_kind", "rope_factor", "rope_original")


def to_raw(config: HiCoConfig, raw: Mapping[str, Any] | None = None, *, torch_dtype: str = "float32") -> dict[str, Any]:
    """`config.json` of a model: `raw` (as it was loaded) wherever that still says the same, unknown keys included.

    Raises:
      ValueError: an architecture whose `config.json` is not known.
    """
    if config.vision.arch == "internvit" and config.llm.arch == "internlm2":
        return hf_internvl.to_raw(config, raw, torch_dtype=torch_dtype)
    if config.vision.arch not in NOMINAL_BLOCKS or config.compressor.arch != "tome" or config.llm.arch != "qwen2":
        raise ValueError(
            f"cannot write config.json of {config.vision.arch} with {config.compressor.arch} and {config.llm.arch}: "
            "the reference knows UMT or InternVideo2 with Qwen2, and InternViT with InternLM2, each with ToMe"
        )
    out = copy.deepcopy(dict(DEFAULTS if raw is None else raw))
    before = None if raw is None else from_raw(raw)
    if before is not None and _same(before, config) and torch_dtype == out.get("torch_dtype", out.get("dtype")):
        return out
    vision, llm, drop = config.vision, config.llm, config.drop
    side = vision.image_px
    if before is None or (before.vision.arch, before.vision.image_px) != (vision.arch, side):
        out["image_grid_pinpoints"] = [[i * side, j * side] for i in range(1, 7) for j in range(1, 7)]
        umt = "umt-hd-large" if side == 448 else "umt-large"
        out["mm_vision_tower"] = umt if vision.arch == "umt" else "internvideo2"
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
    scaled = {} if llm.rope_kind == "default" else {
        "type": llm.rope_kind, "factor": llm.rope_factor, "original_max_position_embeddings": llm.rope_original,
    }  # fmt: skip
    if before is None or any(getattr(before.llm, key) != getattr(llm, key) for key in ROPE):
        out["rope_scaling"] = scaled or None
    if drop.num_stages:
        out |= {
            "llm_compress_type": drop.kind,
            "llm_compress_layer_list": list(drop.layers),
            "llm_image_token_ratio_list": list(drop.ratios),
        }
    for key in ("vision_config", "hico_jax"):
        out.pop(key, None)
    usual_vision = {key: vision.__dataclass_fields__[key].default for key in OWN_VISION if hasattr(vision, key)}
    if _vision(out, {}) != dataclasses.replace(_settled(vision), **usual_vision):
        out["vision_config"] = {
            "image_size": side,
            "patch_size": vision.patch_px,
            "hidden_size": vision.embed_dim,
            "num_hidden_layers": vision.num_blocks - select - 1 if select < 0 else vision.num_blocks,
            "num_attention_heads": vision.num_heads,
            "num_frames": vision.frames_per_clip,
            "mlp_ratio": vision.mlp_ratio,
        }
    own = dataclasses.asdict(config.compressor) | {key: getattr(vision, key) for key in usual_vision}
    own |= {"dtype": config.dtype, "drop_shares": drop.shares if drop.num_stages else 1}
    usual = dataclasses.asdict(ToMeConfig()) | usual_vision
    usual |= {"dtype": ACTIVATIONS.get(torch_dtype, HiCoConfig.dtype), "drop_shares": 1}
    changed = {key: value for key, value in own.items() if value != usual[key]}
    if changed:
        out["hico_jax"] = changed
    lost = _differences(from_raw(out), config)
    if lost:
        raise ValueError(f"config.json of the reference cannot say {', '.join(lost)}; such a model has no PyTorch twin")
    return out


def language_raw(config: HiCoConfig, raw: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of the language model alone, from that of the whole model: stock Qwen2, or InternLM2."""
    if config.llm.arch == "internlm2":
        return {**raw["llm_config"], "torch_dtype": raw["torch_dtype"]}
    own = {
        key: raw[key]
        for key in (
            "attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
            "initializer_range", "intermediate_size", "max_position_embeddings", "max_window_layers",
            "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_scaling",
            "rope_theta", "sliding_window", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
            "use_sliding_window", "vocab_size",
        )
        if key in raw
    }  # fmt: skip
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"} | own


def language_config(raw: Mapping[str, Any], base: HiCoConfig) -> HiCoConfig:
    """`base` with the language model of a plain Qwen2 or InternLM2 `config.json`."""
    if raw.get("model_type") == "qwen2":
        return dataclasses.replace(base, llm=Qwen2Config.from_hf(raw))
    llm = InternLM2Config.from_hf(raw)
    return dataclasses.replace(base, llm=llm, vision=dataclasses.replace(base.vision, merge_heads=llm.num_heads))


def _same(a: HiCoConfig, b: HiCoConfig) -> bool:
    """Equal but for what is chosen anew at every run."""
    return not _differences(a, b)


def _differences(a: HiCoConfig, b: HiCoConfig) -> list[str]:
    """What `b` has otherwise than `a`, but for what is chosen anew at every run: `llm.rope_theta=1e4`."""

    def plain(config: HiCoConfig) -> dict[str, Any]:
        drop = config.drop if config.drop.num_stages else DropSchedule()
        parts = {"vision": _settled(config.vision), "compressor": config.compressor, "llm": _settled(config.llm)}
        whole = {f"{part}.{f.name}": getattr(v, f.name) for part, v in parts.items() for f in dataclasses.fields(v)}
        alone = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in (*parts, "drop")}
        kinds = {f"{part}.arch": v.arch for part, v in parts.items()}
        return kinds | whole | alone | {"drop": drop}

    before, after = plain(a), plain(b)
    return [f"{key}={value!r}" for key, value in after.items() if key not in before or before[key] != value]


OF_A_RUN = ("remat", "remat_keeps", "drop_path")


def _settled(part: Any) -> Any:
    """A part's configuration without what is chosen anew at every run, and no `config.json` tells."""
    usual = {key: field.default for key, field in part.__dataclass_fields__.items() if key in OF_A_RUN}
    return dataclasses.replace(part, **usual)


def _need(raw: Mapping[str, Any], key: str) -> Any:
    if raw.get(key) is None:
        raise ValueError(f"config.json lacks {key}; it is not the configuration of a whole VideoChat-Flash model")
    return raw[key]


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json has {key} {value!r}; it must be an object")
    return value
