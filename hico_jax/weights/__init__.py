"""Trained models that ship with the package, found by name: `hico_jax.load("nano")`, `hico ask --model nano`.

`nano` here is trained weights. `hico train --config=configs/....:nano` names something else: the size of an untrained
model in the registry, a toy for CPUs.

In: what a user named. Out: the folder that holds the model.
Next: hico_jax/ask.py
"""

from __future__ import annotations

import os
import pathlib

NAMES = ("nano",)  # each a folder beside this file
CONFIG = "config.json"


def find(name: str | os.PathLike[str]) -> pathlib.Path:
    """The folder that is meant: one that exists and holds a model wins over a shipped model of the same name.

    What is neither is returned as it came; whoever opens it says what is wrong with it.

    Raises:
      ValueError: a shipped model whose weights this copy of the source lacks.
    """
    given = pathlib.Path(name)
    if os.fspath(name) not in NAMES or (given / CONFIG).is_file():
        return given
    if not shipped(os.fspath(name)):
        raise ValueError(
            f"the weights of {given} are not in {folder(os.fspath(name))}; get the whole repository, or train a model "
            f"with `hico demo --train`"
        )
    return folder(os.fspath(name))


def folder(name: str) -> pathlib.Path:
    """Where a shipped model lies, whether or not its weights are there."""
    return pathlib.Path(__file__).parent / name


def shipped(name: str) -> bool:
    """Whether the weights of a shipped model are there."""
    return (folder(name) / CONFIG).is_file() and any(folder(name).glob("*.safetensors"))


def known() -> str:
    """The shipped names, for messages."""
    return f"or name a shipped model ({', '.join(NAMES)})"
