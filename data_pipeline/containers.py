"""What a file is, judged by its first bytes; the one error that reading media raises.

The name of a file is never trusted: FFmpeg would open a playlist or a list of other files named `.mp4` and return
frames of files the caller did not name. Only the container found here is allowed to open.

In: a path. Out: FFmpeg's name of the container, or "gif", "picture", "folder".
Next: data_pipeline/decode.py
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator

import av
import av.error
from PIL import Image

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"pnot", b"uuid")
_PREFIXES = (
    (b"\x1aE\xdf\xa3", "matroska"),
    (b"FLV\x01", "flv"),
    (b"OggS", "ogg"),
    (b"0&\xb2u\x8ef\xcf\x11", "asf"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"\x00\x00\x01\xb3", "mpegvideo"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"\x89PNG\r\n", "picture"),
    (b"\xff\xd8\xff", "picture"),
    (b"BM", "picture"),
)
# What PyAV and Pillow have been seen to raise on damaged files, beside their own errors.
LEAKS = (
    av.error.FFmpegError, EOFError, IndexError, AttributeError, MemoryError, UnicodeError, OverflowError, OSError,
    TypeError, ValueError, ZeroDivisionError, RuntimeError, KeyError, AssertionError, SyntaxError, struct.error,
    zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class VideoError(ValueError):
    """A film or picture cannot be read; the message names the file and the fault."""


@contextlib.contextmanager
def guard(path: str, doing: str) -> Iterator[None]:
    """Turn whatever a damaged file provokes into one `VideoError` that names the file."""
    try:
        yield
    except VideoError:
        raise
    except LEAKS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"{path}: {doing} failed ({reason}); the file is damaged or not what its name says") from error


def sniff(path: str | os.PathLike[str]) -> str:
    """FFmpeg's name of the container, or "gif", "picture" or "folder".

    Raises:
      VideoError: the file is missing, empty, text, a playlist, or of no known kind.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return "folder"
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise VideoError(f"{path}: not a regular file")
    try:
        with open(path, "rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise VideoError(f"{path}: cannot be opened ({error.strerror})") from error
    kind = _kind(head)
    if kind is None:
        raise VideoError(f"{path}: {_describe(head)}")
    return kind


def _kind(head: bytes) -> str | None:
    if head[4:8] in _BOXES:
        return "mov"
    if head[:4] == b"RIFF":
        return {b"AVI ": "avi", b"WEBP": "picture"}.get(head[8:12])
    for prefix, kind in _PREFIXES:
        if head.startswith(prefix):
            return kind
    for start, step in ((0, 188), (4, 192)):  # MPEG transport stream, plain or with time codes
        if len(head) > start + 3 * step and all(head[start + i * step] == 0x47 for i in range(4)):
            return "mpegts"
    return None


def _describe(head: bytes) -> str:
    if not head:
        return "the file is empty"
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t")
    if start.startswith((b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"[playlist]")):
        return "this is a playlist or a list of other files, not a film; give the film itself"
    if b"\0" not in head:
        with contextlib.suppress(UnicodeDecodeError):
            head[:512].decode("ascii")
            return "this is a text file, not a film"
    return f"not a container this reader knows (it begins {head[:8]!r}); use mp4, mkv, webm, avi, mov, ts or gif"
