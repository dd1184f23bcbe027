"""One run as data: frozen dataclasses are the schema, a ConfigDict is the view that flags may edit.

    thaw(experiment)   dataclasses -> ConfigDict, any field of which a flag may override
    freeze(view)       ConfigDict -> dataclasses: unknown keys refused, everything validated again

A part whose class is a choice (tower, compressor, language model) carries its registry key `arch` in the
view, so that a saved configuration finds its own classes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import pathlib
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from data_pipeline.options import DataConfig
from hico_jax import registry
from hico_jax.models.hico import HiCoConfig
from hico_jax.optim import LoraConfig, OptimConfig
from hico_jax.parallel.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the first weights come from, unless this run already has a checkpoint."""

    parent: str | None = None  # workdir of the run before this one, a stage's parent; parameters only
    weights: tuple[str, ...] = ()  # folders or files of released weights (safetensors)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how much to keep."""

    every: int = 1000  # steps between saves; the last step always saves
    keep: int = 1  # newest checkpoints kept
    asynchronous: bool = True  # write while the next steps run

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"checkpoint.every is {self.every} and keep is {self.keep}; both must be at least 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int | None = None  # optimizer steps of the whole run; None: data.num_epochs passes over the data
    seed: int = 42  # of random weights
    loss_chunk: int = 512  # tokens of a row whose logits exist at one time
    log_every: int = 10  # steps between printed lines; metrics.jsonl has every step
    eval_every: int = 0  # steps between evaluations and sample predictions; 0 only at the end
    num_samples: int = 4  # fixed training examples whose predictions are shown; 0 none
    dry_run: bool = False  # print shapes, parameters, bytes and operations, then stop
    trace: tuple[int, ...] = ()  # (first, count): an XProf trace of so many steps, written to WORKDIR/trace
    distributed: bool = False  # one process per host, joined by jax.distributed; launch/ sets it

    def __post_init__(self) -> None:
        for name in ("steps", "loss_chunk", "log_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be positive, got {getattr(self, name)}")
        if len(self.trace) not in (0, 2) or any(n < 1 for n in self.trace):
            raise ValueError(f"train.trace is {self.trace}; give (first step, number of steps), such as (10, 3)")
        if self.eval_every < 0 or self.num_samples < 0:
            raise ValueError(
                f"train.eval_every is {self.eval_every} and num_samples is {self.num_samples}; neither may be negative"
            )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything one run is made of. `workdir` is where it lives and from where it resumes."""

    stage: str
    model_name: str  # key of registry.MODELS
    model: HiCoConfig
    data: DataConfig
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    workdir: str = ""

    def __post_init__(self) -> None:
        if self.data.batch_size % self.optim.accumulate:
            raise ValueError(
                f"data.batch_size is {self.data.batch_size} but optim.accumulate is {self.optim.accumulate}; "
                "make the batch size a multiple of it"
            )
        heads, kv_heads, tensor = self.model.llm.num_heads, self.model.llm.num_kv_heads, self.mesh.tensor
        if tensor > 1 and math.gcd(heads, kv_heads) % tensor:
            raise ValueError(
                f"{heads} heads and {kv_heads} key/value heads cannot be split over mesh.tensor={tensor}; use a "
                f"divisor of {math.gcd(heads, kv_heads)}"
            )

    @property
    def num_steps(self) -> int:
        """Steps of the run, once they are known."""
        if self.train.steps is None:
            raise ValueError("train.steps is not set and the data does not tell its length; set train.steps")
        return self.train.steps


def thaw(experiment: Experiment) -> ConfigDict:
    """The experiment as a locked ConfigDict; `X | None` fields are typed placeholders."""
    view = _thaw(experiment)
    view.lock()
    return view


def _thaw(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return tuple(_thaw(v) for v in value) if isinstance(value, tuple) else value
    hints = typing.get_type_hints(type(value))
    view = ConfigDict({"arch": getattr(value, "arch")} if hasattr(value, "arch") else {})  # noqa: B009
    for field in dataclasses.fields(value):
        inner = _optional(hints[field.name])
        if inner is None:
            view[field.name] = _thaw(getattr(value, field.name))
        else:
            view[field.name] = config_dict.placeholder(inner)
            view[field.name] = getattr(value, field.name)
    return view


def freeze(view: ConfigDict | Mapping[str, Any]) -> Experiment:
    """Rebuild the dataclasses from a view or from plain nested mappings, and validate.

    Raises:
      ValueError: an unknown key (the nearest valid one is named), a missing one, a value of the wrong type,
        or anything a section's own validation refuses.
    """
    return _freeze(Experiment, view.to_dict() if isinstance(view, ConfigDict) else view, "")


def to_json(experiment: Experiment) -> str:
    """The resolved configuration; `from_json` gives back an equal experiment."""
    return json.dumps(thaw(experiment).to_dict(), indent=2, sort_keys=True)


def from_json(text: str) -> Experiment:
    """Read what `to_json` wrote."""
    return freeze(json.loads(text))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every value that differs between two resolved configurations.

    Example:
      >>> differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})
      ['a.b: 1 -> 3']
    """
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found


def unknown_key(key: str, prefix: str, valid: list[str]) -> ValueError:
    """The error for a key that does not exist, with the nearest one that does."""
    initials = "".join(word[0] for word in key.split("_") if word)  # `learning_rate` is nearest to `lr`
    near = [v for v in valid if v == initials] or difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"valid keys are {', '.join(sorted(valid))}"
    return ValueError(f"unknown key {prefix}{key}; {hint}")


def check_path(view: Any, path: str) -> None:
    """Fail with the nearest key when `path` (dotted) is not in the view."""
    prefix = ""
    for part in path.split("."):
        key = part.split("[")[0]
        if not isinstance(view, ConfigDict):
            raise ValueError(f"unknown key {path}; {prefix.rstrip('.')} is a value, not a section")
        if key not in view:
            raise unknown_key(key, prefix, list(view))
        view, prefix = view[key], f"{prefix}{key}."


def from_flags(argv: Sequence[str]) -> Experiment:
    """`--config=FILE[:VARIANT]` and `--config.a.b=VALUE`, as `ml_collections.config_flags` reads them.

    A value of None empties a field that may be None.

    Raises:
      ValueError: no file, an unknown flag or key, a value that does not parse or does not fit.
    """
    overrides = {arg.split("=", 1)[0][len("--config.") :] for arg in argv if arg.startswith("--config.")}
    plain = [arg for arg in argv if not arg.startswith("--config.")]
    view = _parse_flags(plain)
    for path in sorted(overrides):
        check_path(view, path)
    cleared = [arg for arg in argv if arg.startswith("--config.") and arg.endswith("=None")]
    view = _parse_flags([arg for arg in argv if arg not in cleared])
    for arg in cleared:
        *parents, key = arg[len("--config.") : -len("=None")].split(".")
        section: Any = view
        for parent in parents:
            section = section[parent]
        section[key] = None
    return freeze(view)


def _parse_flags(argv: Sequence[str]) -> ConfigDict:
    values = flags.FlagValues()
    command = ["hico train", *argv]
    for i, name in enumerate(command):
        if name == "--config" and i + 1 < len(command):
            command[i + 1] = _file(command[i + 1])
        elif name.startswith("--config=") and name != "--config=":
            command[i] = f"--config={_file(name.removeprefix('--config='))}"
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections loads the file by an old API
            rest = values(command)
            if values.config is None:
                raise ValueError("no configuration is given; add --config=configs/debug_tiny.py, for example")
    except flags.Error as error:
        cause: BaseException = error
        while "Traceback" in str(cause) and cause.__context__ is not None:  # it quotes what get_config raised
            cause = cause.__context__
        raise ValueError(str(cause) if cause is error or isinstance(cause, ValueError) else repr(cause)) from None
    if rest[1:]:
        raise ValueError(f"unexpected argument {rest[1]!r}; flags read --config.section.field=value")
    return values.config


def _file(given: str) -> str:
    """A configuration file and its argument; `configs/NAME.py` from any folder is what came with the package.

    Raises:
      ValueError: there is no such file.
    """
    name, colon, argument = given.partition(":")
    if os.path.isfile(name):
        return given
    ours = pathlib.Path(__file__).parents[1] / "configs"
    known = sorted(path.name for path in ours.glob("*.py") if path.stem not in ("__init__", "common"))
    if (parts := pathlib.PurePath(name).parts)[:1] == ("configs",) and parts[1:] and parts[1] in known:
        return f"{ours / parts[1]}{colon}{argument}"
    raise ValueError(f"there is no configuration file {name}; configs/ holds {', '.join(known)}")


def _optional(hint: Any) -> type | None:
    """`X` of a hint `X | None`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        args = [a for a in typing.get_args(hint) if a is not types.NoneType]
        if len(args) == 1 and types.NoneType in typing.get_args(hint):
            return typing.get_origin(args[0]) or args[0]
    return None


def _freeze(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint` asks, dataclasses rebuilt from mappings."""
    if isinstance(value, Mapping):
        if "arch" in value:
            hint = registry.config_class(path.split(".")[-1], str(value["arch"]))
        if dataclasses.is_dataclass(hint):
            return _freeze_dataclass(hint, value, path)
        raise ValueError(f"{path} is a section; it must be a {_name(hint)}")
    is_part = hint is Any and path.split(".")[-1] in registry.PARTS
    if is_part or (dataclasses.is_dataclass(hint) and not isinstance(value, hint)):  # type: ignore[arg-type]
        raise ValueError(f"{path} is {value!r}; it must be a section with keys of its own")
    if isinstance(value, list | tuple):
        return _freeze_tuple(hint, value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not _fits(value, hint):
        raise ValueError(f"{path} is {value!r}; it must be {_name(hint)}")
    return value


def _freeze_dataclass(cls: Any, value: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{path}." if path else ""
    given = {k: v for k, v in value.items() if k != "arch"}
    for key in given:
        if key not in fields:
            raise unknown_key(key, prefix, list(fields))
    for name, f in fields.items():
        if name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"missing key {prefix}{name}")
    return cls(**{k: _freeze(hints[k], v, prefix + k) for k, v in given.items()})


def _freeze_tuple(hint: Any, value: list[Any] | tuple[Any, ...], path: str) -> Any:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is not tuple:
        if hint is Any:
            return tuple(value)
        raise ValueError(f"{path} is {value!r}; it must be {_name(hint)}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_freeze(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if len(args) != len(value):
        raise ValueError(f"{path} is {value!r}; it must have {len(args)} entries")
    return tuple(_freeze(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, a) for a in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(hint) or hint)


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("NoneType", "None")
