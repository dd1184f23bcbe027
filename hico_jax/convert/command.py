"""`hico convert` and `hico export`: released weights to our folder, and any of our weights back.

In: the command's options. Out: a folder, and two lines that say what is in it. Both stream from disk to disk.
Next: hico_jax/convert/native.py
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipeline.tokenizer import load_tokenizer
from hico_jax import checkpoint, registry, weights
from hico_jax.api import check_vocabulary
from hico_jax.config import from_json as read_experiment
from hico_jax.convert import export, hf_config, hf_internvl, lazy, load, native, sources
from hico_jax.models.hico import HiCoConfig

LANGUAGE = {"qwen2": "umt_qwen2_7b", "internlm2": "internvl_hico_r16"}  # plain language models, and what they begin


def main_convert(args: argparse.Namespace) -> int:
    """Write the weights of SRC into DST in our layout.

    Raises:
      ValueError: SRC is damaged, not supported, or does not fit; or DST cannot be written.
    """
    source, target = weights.find(args.source), pathlib.Path(os.path.abspath(args.target))
    export.check_target(target, args.overwrite)
    if not source.exists():
        raise ValueError(f"{source} does not exist; give a folder of released weights, or a file of a part of them")
    raw, whole, config = _described(source, args)
    tensors = sources.open_any(source, allow_pickle=args.allow_pickle, vision=config.vision)
    wanted = _abstract(config)
    fit = f"{source} does not fit the model that its {load.CONFIG} describes"
    table = load.rules(config)
    plan = (
        load.plan_whole(wanted, tensors, table, fit) if whole else load.plan_part(wanted, tensors, table, str(source))
    )
    folder = source if source.is_dir() else source.parent
    side = native.side_files(folder) if source.is_dir() else []
    check_tokenizer(folder, side, config)
    dtype = jnp.dtype(args.dtype) if args.dtype else None
    size = sum(int(np.prod(leaf.shape)) for _, leaf in plan.values())
    width = dtype.itemsize if dtype else max((e.dtype.itemsize for _, e in tensors.items_on_disk()), default=1)
    with export.new_folder(target, size * width) as temporary:
        export.copy_files(side, temporary)
        limit = args.max_shard_bytes
        receipt = native.write(temporary, plan, tensors, raw, whole=whole, dtype=dtype, max_shard_bytes=limit)
    print(*tensors.notes, receipt.text("imported", str(target)), sep="\n")
    return 0


def _described(source: pathlib.Path, args: argparse.Namespace) -> tuple[dict[str, Any], bool, HiCoConfig]:
    """The released `config.json`, whether SRC is a whole model, and our configuration of it (or of what it begins)."""
    path = (source if source.is_dir() else source.parent) / load.CONFIG
    whole = args.like is None and source.is_dir()
    if not whole:
        if args.like is None:
            raise ValueError(f"{source} is a part of a model; say of which with --like (a name of `hico models`)")
        config = registry.model_config(args.like)
        raw = hf_config.to_raw(config, None, torch_dtype="bfloat16")
        if source.is_dir() and path.is_file():
            given = load.read_config(source)
            if given.get("model_type") in LANGUAGE:
                config = hf_config.language_config(given, config)
                raw = hf_config.to_raw(config, None, torch_dtype="bfloat16")
        return raw, False, config
    raw = load.read_config(source)
    if native.is_native(raw):
        raise ValueError(f"{source} is in our layout already; `hico export` writes it in the released one")
    if raw.get("model_type") in LANGUAGE:
        config = hf_config.language_config(raw, registry.model_config(LANGUAGE[raw["model_type"]]))
        return hf_config.to_raw(config, None, torch_dtype="bfloat16"), False, config
    config = hf_config.from_raw(raw, source.resolve().name)
    if args.tokens_per_frame is not None:
        compressor = dataclasses.replace(config.compressor, tokens_per_frame=args.tokens_per_frame)
        config = dataclasses.replace(config, compressor=compressor)
    if config.vision.arch == "internvit" and config.compressor.tokens_per_frame != 16:
        raw = hf_internvl.to_raw(config, raw, torch_dtype=str(raw.get("torch_dtype", "bfloat16")))
    return raw, True, config


def check_tokenizer(folder: pathlib.Path, side: list[pathlib.Path], config: HiCoConfig) -> None:
    """A tokenizer must not know more tokens than the model.

    Raises:
      ValueError: it does.
    """
    if not {path.name for path in side} & {"tokenizer.json", "tokenizer.model"}:
        return
    check_vocabulary(load_tokenizer(folder).vocab_size, config.llm.vocab_size, str(folder))


def main_export(args: argparse.Namespace) -> int:
    """Write the weights of SRC into DST as the reference lays them out.

    Raises:
      ValueError: SRC holds no weights that can be exported, or DST cannot be written.
    """
    source, target = weights.find(args.source), pathlib.Path(os.path.abspath(args.target))
    export.check_target(target, args.overwrite)
    raw = load.read_config(source)
    if args.part == "adapter":
        return _export_adapter(source, raw, args)
    side, released = native.side_files(source), None
    if load.holds_weights(raw):
        released = dict(raw["released"]) if native.is_native(raw) else raw
        config = hf_config.from_raw(released, source.resolve().name)
        tries: Iterable[dict[str, Any]] = (_on_disk(source, raw, config),)
    else:
        experiment = read_experiment((source / load.CONFIG).read_text("utf-8"))
        config, wanted = experiment.model, _abstract(experiment.model)
        tries = (lazy.of_checkpoint(found, wanted) for found in checkpoint.stored(str(source)))
        tokenizer = pathlib.Path(experiment.data.tokenizer)
        side = side or native.side_files(tokenizer if tokenizer.is_dir() else tokenizer.parent)
    reason = f"{source} holds no checkpoint"
    for leaves in tries:
        try:
            receipt = export.write_released(
                config, leaves, target, raw=released, files=side, dtype=args.dtype, overwrite=args.overwrite,
                max_shard_bytes=args.max_shard_bytes, language_only=args.part == "llm", eos=_ends(side, released),
            )  # fmt: skip
        except checkpoint.DamagedError as error:  # known only when its array is read; nothing was left
            reason = str(error)
            print(f"{reason}; trying the checkpoint before it", file=sys.stderr)
            continue
        print(receipt.text("exported", str(target)))
        if config.drop.num_stages and config.drop.shares > 1:
            print(f"note: the reference's code drops by the whole row, not by {config.drop.shares} shares of it")
        return 0
    raise ValueError(f"{reason}; there is no other one to export")


def _ends(side: Sequence[pathlib.Path], released: Mapping[str, Any] | None) -> tuple[int, ...]:
    """What ends an answer, from the tokenizer, where neither a file nor `config.json` says it."""
    found = {path.name: path.parent for path in side}
    if export.GENERATION in found or "eos_token_id" in (released or {}):
        return ()
    folder = found.get("tokenizer.json") or found.get("tokenizer.model")
    return load_tokenizer(folder).eos_ids if folder else ()


def _on_disk(source: pathlib.Path, raw: Mapping[str, Any], config: HiCoConfig) -> dict[str, Any]:
    """The parameters of a folder of weights, not read yet."""
    wanted = _abstract(config)
    if not native.is_native(raw):
        tensors = sources.open_any(source)
        fit = f"{source} does not fit the model that its {load.CONFIG} describes"
        return dict(lazy.of_tensors(load.plan_whole(wanted, tensors, load.rules(config), fit), tensors))
    if not raw["whole"]:
        raise ValueError(f"{source} holds a part of a model only; train from it, or convert a whole model")
    tensors = native.read(source)
    wrong = native.problems(wanted, tensors, wanted)
    if wrong:
        raise ValueError(f"{source} does not fit its own {load.CONFIG}: " + "; ".join(wrong))
    return {path: tensors[path] for path in tensors}


def _abstract(config: HiCoConfig) -> dict[str, Any]:
    """The parameters of a model as shapes, by path."""
    return load.by_path(nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))[1])


def _export_adapter(source: pathlib.Path, raw: dict[str, Any], args: argparse.Namespace) -> int:
    """A run's low-rank adapters as a PEFT folder."""
    from hico_jax import config, lora

    if native.is_native(raw) or "model_type" in raw:
        raise ValueError(f"{source} holds whole weights; --part adapter takes the workdir of a run with adapters")
    experiment = config.from_json((source / load.CONFIG).read_text())
    target = pathlib.Path(os.path.abspath(args.target))
    export.check_target(target, args.overwrite)
    base = experiment.init.weights[0] if experiment.init.weights else experiment.init.parent or ""
    with export.new_folder(target, 0) as temporary:
        modules = lora.export_peft(str(source), {r.path: r for r in load.rules(experiment.model)}, temporary, base)
    print(f"adapters of rank {experiment.lora.rank} for {len(modules)} modules in {target}, as PEFT reads them")
    return 0
