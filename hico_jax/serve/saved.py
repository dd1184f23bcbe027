"""A session on disk: what was seen, what was said, and if wished the keys and values of it.

One folder: `session.json` and `session.safetensors`, each whole or absent. A session belongs to the weights that made
it; others are refused.
In: a session's parts. Out: the same parts.
Next: hico_jax/serve/session.py
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline import layout
from hico_jax.api import Model, Pictures
from hico_jax.convert import safetensors_io
from hico_jax.film import UIDS, Film
from hico_jax.models.hico import HiCo
from hico_jax.serve import prompts
from hico_jax.serve.pool import Lane, Pool
from hico_jax.serve.prompts import Media

TEXT, DATA, VERSION = "session.json", "session.safetensors", 1


@dataclasses.dataclass(frozen=True)
class Held:
    """A lane as it was saved."""

    pool_options: dict[str, int]
    names: np.ndarray
    tokens: np.ndarray
    slots: np.ndarray
    lengths: np.ndarray
    tensors: Mapping[str, Any]

    def pool(self, model: HiCo, piece: int) -> Pool:
        """A pool of one lane that continues where the saved one was."""
        pool = Pool(model, count=1, **self.pool_options, piece=piece)
        lane, state = pool.lanes[0], pool.state
        for kind in ("keys", "values"):
            groups = []
            for group, array in enumerate(getattr(state, kind)):
                part = jnp.asarray(self.tensors[f"{kind}.{group}"])
                groups.append(array.at[:, :, :, : part.shape[3]].set(part))
            state = state.replace(**{kind: tuple(groups)})
        pool.state = state
        if "entering" in self.tensors:
            part = jnp.asarray(self.tensors["entering"])
            places = pool.places[pool.schedule.num_uniform] + pool.piece
            lane.entering = jnp.zeros((places, part.shape[1]), part.dtype).at[: len(part)].set(part)
        survives, kept = prompts.drop_of(self.slots, pool.schedule)
        blank = jnp.zeros((1, 0, 0))
        lane.held = prompts.Prompt(self.tokens, self.slots, self.names, blank, survives, kept)
        lane.lengths = self.lengths.astype(np.int32)
        return pool


def write(
    folder: str | os.PathLike[str], model: Model, media: Sequence[Media], history: Sequence[Mapping[str, Any]],
    pool: Pool | None, lane: Lane | None,
) -> None:  # fmt: skip
    """Write a session, replacing the one that the folder holds."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    everything = {one.uid: one for one in (*media, *(m for turn in history for m in turn.get("seen", ())))}
    tensors: dict[str, Any] = {f"visual.{uid}": one.visual for uid, one in everything.items()}
    text: dict[str, Any] = {
        "version": VERSION, "model": fingerprint(model.hico), "media": [one.uid for one in media],
        "seen": {str(uid): _describe(one) for uid, one in everything.items()},
        "history": [{**turn, "seen": [m.uid for m in turn.get("seen", ())]} for turn in history],
    }  # fmt: skip
    for uid, one in everything.items():
        if isinstance(one, Film):
            tensors[f"indices.{uid}"] = one.indices
    if pool is not None and lane is not None and lane.held is not None:
        text["lane"] = {"capacity": pool.capacity, "text_room": pool.text_room}
        held = lane.held
        tensors |= {"names": held.names, "tokens": held.tokens, "slots": held.slots, "lengths": lane.lengths}
        for kind in ("keys", "values"):
            for group, array in enumerate(getattr(pool.state, kind)):
                tensors[f"{kind}.{group}"] = array[:, :, :, : int(lane.lengths[group])]
        if lane.entering is not None:
            tensors["entering"] = lane.entering[: int(lane.lengths[pool.schedule.num_uniform])]
    specs = {name: (np.dtype(a.dtype), tuple(a.shape)) for name, a in tensors.items()}
    (folder / TEXT).unlink(missing_ok=True)  # an interrupted save is no session
    safetensors_io.write_file(folder / DATA, specs, lambda name: np.asarray(tensors[name]))
    safetensors_io.write_atomically(folder / TEXT, json.dumps(text, ensure_ascii=False, indent=1).encode())


def read(folder: str | os.PathLike[str], model: Model) -> tuple[list[Media], list[dict[str, Any]], Held | None]:
    """Media, history, and the lane where it was saved.

    Raises:
      ValueError: no session, a damaged one, or one of another model.
    """
    folder = pathlib.Path(folder)
    if not (folder / TEXT).is_file():
        raise ValueError(f"{folder} holds no {TEXT}; give a folder that `Session.save` wrote")
    try:
        text = json.loads((folder / TEXT).read_text("utf-8"))
        if text["version"] != VERSION:
            raise ValueError(f"{folder} holds a session of version {text['version']}; this program reads {VERSION}")
        if text["model"] != fingerprint(model.hico):
            raise ValueError(f"{folder} was saved with other weights or settings; load the model that it was made with")
        tensors = safetensors_io.open_tensors(folder / DATA)
        found = {int(uid): _media(int(uid), one, tensors) for uid, one in text["seen"].items()}
        media = [found[uid] for uid in text["media"]]
        history = [{**turn, "seen": tuple(found[uid] for uid in turn["seen"])} for turn in text["history"]]
        held = None
        if "lane" in text:
            options = {name: int(text["lane"][name]) for name in ("capacity", "text_room")}
            names = _renamed(np.asarray(tensors["names"]), {uid: one.uid for uid, one in found.items()})
            tokens, slots, lengths = (np.asarray(tensors[name]) for name in ("tokens", "slots", "lengths"))
            held = Held(options, names, tokens, slots, lengths, tensors)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds a damaged session ({error}); open its films anew") from error
    return media, history, held


def fingerprint(model: HiCo) -> str:
    """What tells one model's keys and values from another's: its configuration, and a sum over every parameter."""
    digest = hashlib.sha256(repr(model.config).encode())
    for leaf in jax.tree.leaves(model):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            digest.update(np.asarray(leaf.ravel()[:: max(1, leaf.size // 64)].astype(jnp.float32)).tobytes())
    return digest.hexdigest()


def _describe(one: Media) -> dict[str, Any]:
    if isinstance(one, Film):
        names = ("fps", "duration_s", "num_clips", "read_s", "encode_s")
        return {"film": os.path.basename(one.path), **{name: getattr(one, name) for name in names}}
    return {"pictures": [dataclasses.asdict(v) for v in one.visuals]}


def _media(uid: int, told: Mapping[str, Any], tensors: Mapping[str, Any]) -> Media:
    visual = jnp.asarray(tensors[f"visual.{uid}"])
    if "film" in told:
        rest = {name: told[name] for name in ("fps", "duration_s", "num_clips", "read_s", "encode_s")}
        return Film(told["film"], visual, np.asarray(tensors[f"indices.{uid}"]), **rest)
    visuals = [layout.Visual(**{**v, "grid": tuple(v["grid"]) if v["grid"] else None}) for v in told["pictures"]]
    return Pictures(tuple(visuals), visual)


def _renamed(names: np.ndarray, uids: Mapping[int, int]) -> np.ndarray:
    """The names of a saved row, as the media are called now."""
    now, visual = names.copy(), names < 0
    place = -(names[visual] + 1)
    old, offset = place >> 32, place & (2**32 - 1)
    for uid in np.unique(old).tolist():
        old = np.where(old == uid, -uids.get(uid, next(UIDS)), old)  # negative: told from those not renamed yet
    now[visual] = -((-old << 32) + offset) - 1
    return now
