"""Small films whose frames carry their own number, so that a wrong frame is seen whatever the codec lost."""

from __future__ import annotations

import fractions

import av
import numpy as np
import pytest

BITS = 10


def numbered(index, width=80, height=32):
    """Ten columns, black or white: the bits of the index."""
    bits = (index >> np.arange(BITS)) & 1
    columns = np.repeat(bits, -(-width // BITS))[:width] * 200 + 20
    return np.broadcast_to(columns[None, :, None], (height, width, 3)).astype(np.uint8)


def read_number(frame):
    width = frame.shape[1]
    step = width / BITS
    centres = ((np.arange(BITS) + 0.5) * step).astype(int)
    values = frame[frame.shape[0] // 2, centres].mean(-1)
    return int(((values > 120) << np.arange(BITS)).sum())


def write_film(
    path, count=50, *, codec="libx264", container=None, rate=25, options=None, width=80, height=32, pix_fmt="yuv420p",
    times=None, rotation=None, tag=None,
):  # fmt: skip
    with av.open(str(path), "w", format=container) as film:
        stream = film.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(i, width, height), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], fractions.Fraction(1, 1000)
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    return path


def remux(source, target, keep, *, shift=0, container=None):
    """Copy the packets for which keep(number, packet) holds, shifting their times."""
    with av.open(str(source)) as given, av.open(str(target), "w", format=container) as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        packets = [p for p in given.demux(given.streams.video[0]) if p.dts is not None]
        for number, packet in enumerate(packets):
            if keep(number, packet):
                packet.stream = stream
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                made.mux(packet)
    return target


@pytest.fixture(scope="session")
def film_kit():
    class Kit:
        numbered = staticmethod(numbered)
        read_number = staticmethod(read_number)
        write = staticmethod(write_film)
        remux = staticmethod(remux)

    return Kit


@pytest.fixture(scope="session")
def film(film_kit, tmp_path_factory):
    """Fifty numbered frames at 25 a second, a keyframe every twelve, with B-frames."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return film_kit.write(path, options={"g": "12", "bf": "2"})
