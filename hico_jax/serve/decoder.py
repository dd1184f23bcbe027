"""Strangers' files are read in processes that may take neither more memory nor more time than they were given.

A helper process has everything imported and forks one child for each file. The child gives up the network, the right
to write files, more memory and more processor time, decodes, and streams pixels back; whatever a crafted file does to
it ends it alone. Nothing here touches a device.

In: a path and how to sample. Out: a header, then frames, a chunk at a time.
Next: hico_jax/serve/media.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipeline import decode, video
from data_pipeline.frames import Sampling
from data_pipeline.image import read_image
from hico_jax.serve import confine

HEAD, PIXELS, FAULT = b"H", b"P", b"F"
_FRAME = struct.Struct(">cI")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one file may be, and what reading it may take."""

    pixels: int = 4096 * 4096  # of one frame or picture
    duration_s: float = 4 * 3600.0
    source_frames: int = 36_000  # in the film, whether they are seen or not
    seconds: float = 120.0  # of wall-clock and of processor time
    memory_bytes: int = 2 << 30  # beside what the interpreter takes


class MediaError(ValueError):
    """A file that cannot be taken; the message names no path."""


class Decoder:
    """The helper process. It is started when first needed, and again should it ever end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None

    def read(self, path: str, **job: Any) -> Iterator[Any]:
        """The header of a file (a dict), then its frames in chunks, uint8 [T, height, width, 3].

        Args:
          job: `limits`; of a film `px`, `sampling`, `chunk`, `start`, `end`; of a picture `picture=True`.

        Raises:
          MediaError: what is wrong with the file, or which limit it exceeds.
        """
        limits: Limits = job.pop("limits", None) or Limits()
        task = {"path": path, "limits": dataclasses.asdict(limits), **job}
        if "sampling" in task:
            task["sampling"] = dataclasses.asdict(task["sampling"])
        reader, writer = os.pipe()
        try:
            self._send(json.dumps(task).encode(), writer)
        finally:
            os.close(writer)
        with open(reader, "rb", buffering=0) as pipe:
            yield from _messages(pipe, time.monotonic() + limits.seconds + 5)

    def confinement(self) -> tuple[str, ...]:
        """What keeps reading processes off the network here (names of `confine.py`); none: nothing does.

        Raises:
          MediaError: a reading process could not even begin.
        """
        told, *_ = self.read("", probe=True)
        return tuple(told["held"])

    def _send(self, task: bytes, writer: int) -> None:
        with self.lock:
            for attempt in (0, 1):
                if self.process is None or self.process.poll() is not None:
                    self._stop()
                    self._start()
                assert self.socket is not None
                try:
                    socket.send_fds(self.socket, [task], [writer])
                    return
                except OSError:
                    self._stop()
                    if attempt:
                        raise

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "hico_jax.serve.decoder", str(theirs.fileno())]
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=_environment()
            )
        self.socket = ours

    def _stop(self) -> None:
        if self.socket is not None:
            self.socket.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self.socket = None

    def close(self) -> None:
        """End the helper."""
        with self.lock:
            self._stop()


def _environment() -> dict[str, str]:
    """No secrets for who reads strangers' files."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"JAX_PLATFORMS": "cpu"}


def _messages(pipe: Any, deadline: float) -> Iterator[Any]:
    shape: tuple[int, ...] = ()
    while True:
        kind, size = _FRAME.unpack(head) if (head := _exactly(pipe, _FRAME.size, deadline)) else (b"", 0)
        if not kind:
            raise MediaError("reading this file took more memory or time than is allowed, or it broke the reader")
        if size > 1 << 30:
            raise MediaError("reading this file gave nonsense")
        data = _exactly(pipe, size, deadline)
        if len(data) < size:
            raise MediaError("reading this file took more memory or time than is allowed, or it broke the reader")
        if kind == FAULT:
            raise MediaError(data.decode("utf-8", "replace"))
        if kind == HEAD:
            told = json.loads(data)
            if "end" in told:
                return
            shape = tuple(told["shape"])
            yield told
        else:
            yield np.frombuffer(data, np.uint8).reshape(-1, *shape)


def _exactly(pipe: Any, size: int, deadline: float) -> bytes:
    """So many bytes, or fewer when the writer is gone or too late."""
    parts, left = [], size
    while left:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        part = pipe.read(min(left, 1 << 20)) if ready else b""
        if not part:
            return b""
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


# --- the helper and its children -----------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Fork a child for every task, until the other side is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    with socket.socket(fileno=descriptor) as tasks:
        while True:
            task, writers, _, _ = socket.recv_fds(tasks, 1 << 16, 1)
            if not task:
                return
            if os.fork() == 0:
                tasks.close()
                with contextlib.suppress(BaseException):
                    _child(json.loads(task), writers[0])
                os._exit(0)
            os.close(writers[0])


def _child(task: dict[str, Any], writer: int) -> None:
    limits = Limits(**task.pop("limits"))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody listens any more: end
    held = _confine(limits)
    with open(writer, "wb", buffering=0) as pipe:

        def say(kind: bytes, data: bytes) -> None:
            pipe.write(_FRAME.pack(kind, len(data)))
            view = memoryview(data)
            while view:
                view = view[pipe.write(view) :]

        path, probe = task.pop("path"), task.pop("probe", False)
        try:
            read = _picture if task.pop("picture", False) else _film
            for item in [{"shape": [], "held": held}] if probe else read(path, limits, **task):
                if isinstance(item, dict):
                    say(HEAD, json.dumps(item).encode())
                else:
                    say(PIXELS, np.ascontiguousarray(item).tobytes())
            say(HEAD, b'{"end": true}')
        except MemoryError:
            say(FAULT, b"reading this file took more memory than is allowed")
        except ValueError as error:
            text = str(error).replace(f"{path}: ", "").replace(path, "the file")
            say(FAULT, text.encode()[:500])


def _confine(limits: Limits) -> tuple[str, ...]:
    """No more memory, time or files than allowed, no network; nothing can be written but the pipe. What holds of it."""
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    seconds = max(1, round(limits.seconds))
    for what, most in (
        (resource.RLIMIT_AS, now + limits.memory_bytes), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64),
    ):  # fmt: skip
        resource.setrlimit(what, (most, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits.seconds)
    decode.MAX_PIXELS = limits.pixels
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = limits.pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    return confine.give_up()


def _film(
    path: str, limits: Limits, *, px: int, sampling: dict[str, Any], chunk: int, start: float | None = None,
    end: float | None = None,
) -> Iterator[Any]:  # fmt: skip
    info = video.open_video(path)
    if info.width * info.height > limits.pixels:
        raise MediaError(f"frames of {info.width}x{info.height} have more than {limits.pixels} pixels")
    if info.duration_s > limits.duration_s:
        raise MediaError(f"the video lasts {info.duration_s:.0f} s; at most {limits.duration_s:.0f} s are taken")
    if info.num_frames > limits.source_frames:
        raise MediaError(f"the video has {info.num_frames} frames; at most {limits.source_frames} are taken")
    indices, duration = video.choose(info, Sampling(**sampling), start=start, end=end)
    yield {
        "shape": [px, px, 3], "indices": indices.tolist(), "fps": info.fps, "duration_s": duration,
        "width": info.width, "height": info.height, "damaged": info.damaged,
    }  # fmt: skip
    yield from video.iter_frames(path, indices, (px, px), chunk)


def _picture(path: str, limits: Limits) -> Iterator[Any]:
    picture = read_image(path)
    if picture.width * picture.height > limits.pixels:
        raise MediaError(f"{picture.width}x{picture.height} are more than {limits.pixels} pixels")
    pixels = np.asarray(picture)
    yield {"shape": list(pixels.shape), "width": picture.width, "height": picture.height}
    yield pixels[None]


if __name__ == "__main__":
    serve(int(sys.argv[1]))
