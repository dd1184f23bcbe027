"""Low-rank adapters on any weight (Hu et al. 2021), over a frozen base that may be held in 8 bits (QLoRA).

An adapted weight is `base + alpha / rank * a b`. It is made where the layer uses it, inside the scan over layers, so
that one layer's sum exists at a time and no model code knows of it. The base is quantized by qwix.

In: a frozen model and a `LoraConfig`. Out: adapters that train, a model with both; merged weights, a PEFT folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hico_jax import checkpoint
from hico_jax.convert.rules import Rule
from hico_jax.convert.safetensors_io import write_file
from hico_jax.models.layers import inputs
from hico_jax.optim import LoraConfig

PREFIX = "lora"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """What an adapted parameter holds in place of its array; indexing it gives the sum."""

    base: Any  # an array, or qwix's QArray
    a: Any  # Float[... inputs rank]
    b: Any  # Float[... rank outputs]
    scale: float = dataclasses.field(metadata={"static": True})

    def __getitem__(self, key: Any) -> jax.Array:
        base = _dense(self.base)
        return (base + _delta(self.a, self.b, self.scale, base.shape).astype(base.dtype))[key]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape


def _delta(a: Any, b: Any, scale: float, shape: tuple[int, ...]) -> Any:
    return (scale * (a @ b)).reshape(shape)


def _dense(base: Any) -> Any:
    if not hasattr(base, "qvalue"):
        return base
    import qwix

    return qwix.dequantize(base)


def _sides(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> tuple[tuple[int, ...], int, int]:
    """Leading (layer) dims, and the sizes of both sides of the matrix."""
    lead, dims = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
    k = inputs(axes)
    return lead, math.prod(dims[:k]), math.prod(dims[k:])


def chosen(frozen: Any, config: LoraConfig) -> dict[str, Any]:
    """The variables that get adapters, by path.

    Raises:
      ValueError: a pattern that matches no weight, or one without two sides.
    """
    table = _variables(frozen)
    for pattern in config.targets:
        if not any(re.fullmatch(pattern, name) for name in table):
            raise ValueError(f"the pattern {pattern!r} of lora.targets matches no parameter")
    found = {n: v for n, v in table.items() if any(re.fullmatch(p, n) for p in config.targets)}
    for name, variable in found.items():
        if len(variable.get_metadata("axes")) < 2:
            raise ValueError(f"lora.targets matches {name}, which is no matrix; adapters are for matrices")
    return found


def begin(frozen: Any, config: LoraConfig, seed: int) -> dict[str, Any]:
    """New adapters: `a` random, `b` zero, so that training begins with the base model itself."""
    key, arrays = jax.random.key(seed), {}
    for i, (name, variable) in enumerate(chosen(frozen, config).items()):
        axes = variable.get_metadata("axes")
        lead, rows, columns = _sides(tuple(variable.get_value().shape), axes)
        bound = 1 / math.sqrt(rows)  # PEFT's kaiming_uniform(a=sqrt(5))
        a = jax.random.uniform(jax.random.fold_in(key, i), (*lead, rows, config.rank), jnp.float32, -bound, bound)
        arrays[f"{PREFIX}/{name}/a"] = nnx.Param(a, axes=(axes[0], None))
        arrays[f"{PREFIX}/{name}/b"] = nnx.Param(jnp.zeros((*lead, config.rank, columns)), axes=(None, axes[-1]))
    return checkpoint.nest(arrays)


def quantize(frozen: Any, config: LoraConfig) -> Any:
    """The frozen state with its adapted weights in 8 bits, one scale for each output of each layer."""
    if config.base == "full":
        return frozen
    import qwix

    names = chosen(frozen, config).keys()

    def one(name: str, variable: Any) -> Any:
        if name not in names:
            return variable
        value, axes = variable.get_value(), variable.get_metadata("axes")
        lead, k = value.ndim - len(axes), inputs(axes)
        kept = [*range(lead), *range(lead + k, value.ndim)]
        return variable.replace(qwix.quantize(value, "int8", channelwise_axes=kept))

    return _map(one, frozen)


def join(trainable: Any, frozen: Any, config: LoraConfig) -> tuple[Any, ...]:
    """The states to merge with the model's structure: adapters sit in the weights they adapt."""
    if not config.rank:
        return trainable, frozen
    adapters = checkpoint.flatten(trainable)
    scale = config.alpha / config.rank

    def one(name: str, variable: Any) -> Any:
        a = adapters.get(f"{PREFIX}/{name}/a")
        if a is None:
            return variable
        return variable.replace(Adapted(variable.get_value(), a, adapters[f"{PREFIX}/{name}/b"], scale))

    return (_map(one, frozen),)


def adapted(arrays: Mapping[str, Any]) -> list[str]:
    """Paths of the weights that have adapters in a checkpoint's flat parameters."""
    first = f"{PREFIX}/"
    return [n.removeprefix(first).removesuffix("/a") for n in arrays if n.startswith(first) and n.endswith("/a")]


def merge(arrays: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Flat parameters of a checkpoint with the adapters added to their weights (float32, on the host)."""
    merged = {n: np.asarray(a) for n, a in arrays.items() if not n.startswith(f"{PREFIX}/")}
    scale = config.alpha / config.rank
    for name in adapted(arrays):
        a, b = (np.asarray(arrays[f"{PREFIX}/{name}/{side}"], np.float32) for side in "ab")
        if f"{name}/qvalue" in merged:
            base = merged.pop(f"{name}/qvalue").astype(np.float32) * merged.pop(f"{name}/scale")
        else:
            base = merged[name]
        merged[name] = (base + _delta(a, b, scale, base.shape)).astype(np.float32)
    return merged


def load_merged(workdir: str, params: Any) -> checkpoint.Restored:
    """`checkpoint.load_params`, for runs with adapters too: those come back merged.

    Raises:
      ValueError: as `load_params` does.
    """
    told = checkpoint.read_meta(workdir)
    config = config_of(told)
    if not config.rank:
        return checkpoint.load_params(workdir, params)
    found = _load(workdir, told)
    arrays = merge(checkpoint.flatten(found.params), config)
    flat = checkpoint.flatten(params)
    problems = checkpoint.mismatches(arrays, flat)
    if problems:
        raise ValueError(f"{workdir} does not fit this model:\n  " + "\n  ".join(problems))
    placed = {n: jax.device_put(a, getattr(flat[n], "sharding", None)) for n, a in arrays.items()}
    return dataclasses.replace(found, params=checkpoint.nest(placed))


def _load(workdir: str, told: Mapping[str, Any]) -> checkpoint.Restored:
    """Base and adapters as the checkpoint holds them."""
    wanted = {n: jax.ShapeDtypeStruct(a["shape"], a["dtype"]) for n, a in told["arrays"].items()
              if n.startswith(f"{checkpoint.PARAMS}/")}  # fmt: skip
    return checkpoint.load_params(workdir, checkpoint.nest({n.split("/", 1)[1]: a for n, a in wanted.items()}))


def export_peft(workdir: str, rules: Mapping[str, Rule], out: str | os.PathLike[str], base: str = "") -> list[str]:
    """`save_peft` of a run's newest sound checkpoint.

    Raises:
      ValueError: the run has no adapters, or none that PEFT could hold.
    """
    told = checkpoint.read_meta(workdir)
    config = config_of(told)
    if not config.rank:
        raise ValueError(f"{workdir} is no run with adapters (configs/finetune_lora.py); leave out --part adapter")
    return save_peft(checkpoint.flatten(_load(workdir, told).params), config, rules, out, base)


def config_of(meta: Mapping[str, Any]) -> LoraConfig:
    """The adapters' settings in a checkpoint's JSON."""
    told = dict(meta.get("config", {}).get("lora") or {})
    if "targets" in told:
        told["targets"] = tuple(told["targets"])
    return LoraConfig(**told)


def save_peft(
    arrays: Mapping[str, Any],
    config: LoraConfig,
    rules: Mapping[str, Rule],
    out: str | os.PathLike[str],
    base: str = "",
) -> list[str]:
    """Write adapters as PEFT reads them (`adapter_config.json`, `adapter_model.safetensors`); the module names.

    Raises:
      ValueError: an adapter on a weight that has no torch name of two sides.
    """
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    for name in adapted(arrays):
        rule, path = rules.get(name), f"{PREFIX}/{name}"
        if rule is None or not rule.torch.endswith(".weight"):
            raise ValueError(f"{path} has no torch name; merge it instead")
        a, b = (np.asarray(arrays[f"{path}/{side}"], np.float32) for side in "ab")
        layers = range(a.shape[0]) if rule.stacked else [None]
        for i, module in zip(layers, rule.names(a.shape[0]), strict=True):
            module = module.removesuffix(".weight")
            modules.append(module)
            left, right = (a, b) if i is None else (a[i], b[i])
            tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(left.T)
            tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(right.T)
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.rank, "lora_alpha": config.alpha, "bias": "none",
        "lora_dropout": 0.0, "target_modules": sorted(modules), "base_model_name_or_path": base,
        "inference_mode": True, "fan_in_fan_out": False,
    }  # fmt: skip
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_file(folder / "adapter_model.safetensors", specs, tensors.__getitem__)
    (folder / "adapter_config.json").write_text(json.dumps(told, indent=2) + "\n")
    return modules


def _variables(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_variable)
    return {checkpoint.path_of(path): v for path, v in leaves if _is_variable(v)}


def _map(f: Any, state: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda p, v: f(checkpoint.path_of(p), v), state, is_leaf=_is_variable)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
