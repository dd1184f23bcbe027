"""What people send: kept in one folder under names of our own, read apart, encoded once, let go when room is needed.

In: bytes of an upload, of a data URL or of an allowed address. Out: `Film`s and `Pictures` on the device.
Next: hico_jax/serve/prompts.py
"""

from __future__ import annotations

import base64
import binascii
import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline import layout
from data_pipeline.containers import VideoError, sniff
from hico_jax import ask, film
from hico_jax.api import Model
from hico_jax.film import Film, Viewer
from hico_jax.serve.decoder import Decoder, Limits, MediaError
from hico_jax.serve.prompts import Media

Run = Callable[[Callable[[], Any]], concurrent.futures.Future]


@dataclasses.dataclass(frozen=True)
class Allowance:
    """How much may be kept."""

    file_bytes: int = 512 << 20  # of one upload
    total_bytes: int = 8 << 30  # of all of them; the one unused longest goes first
    seconds: float = 24 * 3600.0  # that an unused upload stays
    encoded: int = 32  # films and pictures on the device
    readers: int = 2  # files read at a time


@dataclasses.dataclass
class Item:
    """A file somebody sent."""

    id: str
    owner: str
    name: str  # as its owner calls it; never a path of ours
    path: pathlib.Path
    size: int
    created: int
    used: float
    kind: str  # "video" or "image"


class Store:
    """Uploads and what was encoded of them. Ids cannot be guessed, and serve their owner only."""

    def __init__(
        self, folder: str | os.PathLike[str], model: Model, run: Run, *, limits: Limits, allowance: Allowance,
        max_frames: int | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.model, self.run = pathlib.Path(folder), model, run
        self.limits, self.allowance = limits, allowance
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.items: dict[str, Item] = {}
        self.same: dict[tuple[str, bytes], Item] = {}  # of bytes sent within a request, by owner and digest
        self.encoded: collections.OrderedDict[tuple[Any, ...], Media] = collections.OrderedDict()
        self.under_way: dict[tuple[Any, ...], concurrent.futures.Future] = {}
        self.lock = threading.RLock()
        self.decoder = Decoder()
        self.readers = threading.BoundedSemaphore(allowance.readers)
        sampling = model.viewer.sampling
        if max_frames is not None:
            sampling = dataclasses.replace(
                sampling, max_frames=max_frames, min_frames=min(sampling.min_frames, max_frames)
            )
        self.sampling = ask.whole_clips(sampling, model.hico)

    # --- files -----------------------------------------------------------------------------------------------------

    def begin(self) -> pathlib.Path:
        """A new file of ours to write an upload into."""
        return self.folder / f"{secrets.token_hex(16)}.part"

    def keep(self, part: pathlib.Path, owner: str, name: str) -> Item:
        """Take a written upload in.

        Raises:
          MediaError: it is no video and no picture.
        """
        try:
            kind = "image" if (found := sniff(part)) == "picture" else "video"
            if found == "folder":
                raise MediaError("a folder is no video")
        except (VideoError, MediaError) as error:
            part.unlink(missing_ok=True)
            raise MediaError(str(error).replace(f"{part}: ", "")) from None
        path, now = part.with_suffix(""), time.time()
        part.rename(path)
        item = Item(f"file-{path.name}", owner, name, path, path.stat().st_size, int(now), now, kind)
        with self.lock:
            self.items[item.id] = item
            self._make_room()
        return item

    def put(self, data: bytes, owner: str, name: str) -> Item:
        """Take bytes in; the same bytes of the same owner once, since a talk sends its film again with every turn.

        Raises:
          MediaError: too many, or no video and no picture.
        """
        if len(data) > self.allowance.file_bytes:
            raise MediaError(f"the file has {len(data)} bytes; at most {self.allowance.file_bytes} are taken")
        key = (owner, hashlib.sha256(data).digest())
        with self.lock:
            if (item := self.same.get(key)) is not None:
                item.used = time.time()
                return item
        part = self.begin()
        part.write_bytes(data)
        item = self.keep(part, owner, name)
        with self.lock:
            if (first := self.same.get(key)) is not None:  # the same request twice at once
                self.remove(item)
                return first
            if item.id in self.items:  # another's upload may have needed its room already
                self.same[key] = item
        return item

    def find(self, id: str, owner: str) -> Item:
        """An item of its owner.

        Raises:
          KeyError: there is none of that name, or it is somebody else's.
        """
        with self.lock:
            item = self.items.get(id)
            if item is None or item.owner != owner:
                raise KeyError(id)
            item.used = time.time()
            return item

    def remove(self, item: Item) -> None:
        """Forget a file and what was encoded of it."""
        with self.lock:
            self.items.pop(item.id, None)
            for key in [k for k in self.encoded if k[0] == item.id]:
                del self.encoded[key]
            for known in [k for k, other in self.same.items() if other is item]:
                del self.same[known]
            item.path.unlink(missing_ok=True)

    def _make_room(self) -> None:
        now, order = time.time(), sorted(self.items.values(), key=lambda i: i.used)
        total = sum(i.size for i in order)
        for item in order[:-1]:
            if total > self.allowance.total_bytes or now - item.used > self.allowance.seconds:
                total -= item.size
                self.remove(item)

    def close(self) -> None:
        """Remove everything that was sent."""
        self.decoder.close()
        with self.lock:
            for item in list(self.items.values()):
                self.remove(item)
            for part in self.folder.glob("*.part"):
                part.unlink(missing_ok=True)

    # --- what the model sees -----------------------------------------------------------------------------------------

    def see(
        self, item: Item, *, start: float | None = None, end: float | None = None, single: bool = True,
        patience_s: float | None = None,
    ) -> Media:  # fmt: skip
        """A film or picture on the device, encoded once however many ask for it. Call it from a thread that may wait.

        Raises:
          MediaError: it cannot be read, or exceeds a limit.
          TimeoutError: its turn did not come within `patience_s`.
        """
        key = (item.id, start, end, single if item.kind == "image" else True)
        with self.lock:
            if key in self.encoded:
                self.encoded.move_to_end(key)
                return self.encoded[key]
            mine = key not in self.under_way
            future = self.under_way.setdefault(key, concurrent.futures.Future())
        if not mine:
            return future.result(patience_s)
        try:
            if not self.readers.acquire(timeout=patience_s):
                raise TimeoutError(f"no reader was free for {patience_s:g} s")
            try:
                seen = self._picture(item, single) if item.kind == "image" else self._film(item, start, end)
            finally:
                self.readers.release()
        except BaseException as error:
            with self.lock:
                del self.under_way[key]
            future.set_exception(error)
            raise
        with self.lock:  # in one go: who comes in between would read it again
            del self.under_way[key]
            if item.id in self.items:  # its owner may have taken it away meanwhile
                self.encoded[key] = seen
            while len(self.encoded) > self.allowance.encoded:
                self.encoded.popitem(last=False)
        future.set_result(seen)
        return seen

    def _film(self, item: Item, start: float | None, end: float | None) -> Film:
        viewer = Viewer(
            self.model.hico, self.model.tokenizer, sampling=self.sampling,
            clips_per_step=self.model.viewer.clips_per_step,
        )  # fmt: skip
        geometry = viewer.geometry
        chunk = viewer.clips_per_step * geometry.frames_per_clip
        source = self.decoder.read(
            str(item.path), limits=self.limits, px=geometry.image_px, sampling=self.sampling, chunk=chunk,
            start=start, end=end,
        )  # fmt: skip
        try:
            told = next(source)
            indices = np.array(told["indices"], np.int64)
            clips = layout.Visual.film(len(indices), geometry).num_clips
            viewer.check_room(item.name, clips)
            frames = self._ordered(source, indices)
            run = lambda work: self.run(work).result()
            return viewer.assemble(item.name, frames, indices, told["fps"], told["duration_s"], run)
        except MediaError:
            raise
        except ValueError as error:
            raise MediaError(str(error)) from error
        finally:
            source.close()  # type: ignore[attr-defined]

    @staticmethod
    def _ordered(source: Iterator[Any], indices: np.ndarray) -> Iterator[np.ndarray]:
        count = 0
        for frames in source:
            count += len(frames)
            yield frames
        if count != len(indices):
            raise MediaError(f"only {count} of {len(indices)} frames could be read")

    def _picture(self, item: Item, single: bool) -> Media:
        source = self.decoder.read(str(item.path), limits=self.limits, picture=True)
        next(source)
        pixels = next(source)[0]
        source.close()  # type: ignore[attr-defined]
        pictures = [Image.fromarray(pixels)]
        if not single:  # one of several: a single tile, padded to a square
            pictures = pictures * 2
        try:
            seen = self.run(lambda: self.model.look(pictures)).result()
        except ValueError as error:
            raise MediaError(str(error)) from error
        if single:
            return seen
        per = self.model.geometry.tokens_per_image
        return dataclasses.replace(seen, visuals=seen.visuals[:1], visual=seen.visual[:, :per], uid=next(film.UIDS))


def data_url(url: str, most: int) -> bytes:
    """The bytes of a `data:` URL.

    Raises:
      MediaError: it is not one in base64, or is too long.
    """
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise MediaError("a data URL reads data:TYPE;base64,BYTES")
    if len(body) > most * 4 // 3 + 4:
        raise MediaError(f"the file in this URL has more than {most} bytes")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise MediaError("the bytes of this data URL are not base64") from None
