from __future__ import annotations

import tracemalloc

import av
import numpy as np
import pytest

from data_pipeline import decode
from data_pipeline.containers import VideoError

X264 = "libx264"
X265 = "log-level=none:pools=none:frame-threads=1"
HDR = "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
VP9 = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "8"}
STRUCTURES = {  # name: codec, container, encoder options
    "every frame a key": (X264, "mp4", {"g": "1"}),
    "P only": (X264, "mp4", {"g": "10", "bf": "0"}),
    "B pyramid": (X264, "mp4", {"g": "24", "bf": "3", "b-pyramid": "normal"}),
    "open GOP": (X264, "mp4", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "one GOP": (X264, "mp4", {"g": "250", "bf": "3"}),
    "periodic refresh": (X264, "mp4", {"g": "20", "bf": "0", "x264-params": "intra-refresh=1"}),
    "mkv": (X264, "matroska", {"g": "12", "bf": "3"}),
    "transport stream": (X264, "mpegts", {"g": "12", "bf": "2"}),
    "h265": ("libx265", "mp4", {"g": "12", "x265-params": f"bframes=3:{X265}"}),
    "h265 open": ("libx265", "mp4", {"x265-params": f"keyint=12:open-gop=1:bframes=4:{X265}"}),
    "vp9": ("libvpx-vp9", "webm", {"g": "12", **VP9}),
    "mpeg4": ("mpeg4", "mp4", {"g": "12", "bf": "2"}),
    "mpeg4 in avi": ("mpeg4", "avi", {"g": "12", "bf": "0"}),
    "mpeg2": ("mpeg2video", "mpegts", {"g": "12", "bf": "2"}),
}  # fmt: skip


@pytest.fixture(scope="module", params=STRUCTURES, ids=str)
def structure(request, film_kit, tmp_path_factory):
    codec, container, options = STRUCTURES[request.param]
    path = tmp_path_factory.mktemp("gop") / f"film.{container}"
    return film_kit.write(path, 90, codec=codec, container=container, options=options)


def numbers(film_kit, path, wanted):
    return [film_kit.read_number(f) for f in decode.iter_film(path, wanted)]


def test_the_same_frames_whichever_way(structure, film_kit, monkeypatch):
    """Frame i is the i-th shown, jumping always, jumping never, or jumping where it pays."""
    index = decode.film_index(structure)
    assert index.num_frames == 90
    assert index.fps == pytest.approx(25, abs=0.01)
    rng = np.random.default_rng(0)
    for wanted in (np.arange(90), [0], [89], [37], np.sort(rng.choice(90, 7, replace=False)), [11, 12, 12, 60]):
        expected = [int(i) for i in wanted]
        for cost in (-1, 12, 1000):
            monkeypatch.setattr(decode, "SEEK_COST", cost)
            assert numbers(film_kit, structure, wanted) == expected, cost


def test_pixels_do_not_depend_on_the_way(structure, monkeypatch):
    wanted = [5, 30, 31, 77]
    made = []
    for cost in (-1, 1000):
        monkeypatch.setattr(decode, "SEEK_COST", cost)
        made.append(np.stack(list(decode.iter_film(structure, wanted))))
    assert (made[0] == made[1]).all()
    everything = list(decode.iter_film(structure, np.arange(90)))  # then nothing is left undecoded
    assert (made[0] == np.stack([everything[i] for i in wanted])).all()


def test_a_far_frame_is_reached_without_decoding_all(film_kit, tmp_path, monkeypatch):
    path = film_kit.write(tmp_path / "long.mp4", 400, options={"g": "20"})
    decoded = []
    plain = decode._decode
    monkeypatch.setattr(decode, "_decode", lambda *a: (decoded.append(0) or f for f in plain(*a)))
    assert numbers(film_kit, path, [10, 200, 390]) == [10, 200, 390]
    assert len(decoded) < 90  # three groups of twenty, and what the decoder holds back
    decoded.clear()
    assert numbers(film_kit, path, [0, 4, 9]) == [0, 4, 9]
    assert len(decoded) < 16


def test_indices_are_checked(film):
    with pytest.raises(ValueError, match="has 50 frames; index 50 is outside"):
        list(decode.iter_film(film, [50]))
    with pytest.raises(ValueError, match="must not fall"):
        list(decode.iter_film(film, [3, 2]))
    assert list(decode.iter_film(film, [])) == []


def test_variable_frame_rate(film_kit, tmp_path):
    """Uneven times: the index is the display order, the rate is the average."""
    times = np.cumsum([0] + [20, 80, 40, 200] * 10)[:40].tolist()
    path = film_kit.write(tmp_path / "vfr.mkv", 40, times=times, options={"g": "8", "bf": "2"})
    index = decode.film_index(path)
    assert index.num_frames == 40
    assert numbers(film_kit, path, np.arange(40)) == list(range(40))
    assert numbers(film_kit, path, [3, 17, 39]) == [3, 17, 39]
    assert 5 < index.fps < 30


def test_a_start_time_that_is_not_zero(film, film_kit, tmp_path):
    path = film_kit.remux(film, tmp_path / "late.mkv", lambda n, p: True, shift=90_000)
    with av.open(str(path)) as opened:
        assert opened.streams.video[0].start_time > 0
    assert decode.film_index(path).num_frames == 50
    assert numbers(film_kit, path, [0, 13, 49]) == [0, 13, 49]


def test_a_film_cut_before_its_first_keyframe(film, film_kit, tmp_path):
    """What cannot be decoded is not counted; frame 0 is the first that is shown."""
    path = film_kit.remux(film, tmp_path / "cut.ts", lambda n, p: n >= 5, container="mpegts")
    index = decode.film_index(path)
    shown = numbers(film_kit, path, np.arange(index.num_frames))
    assert len(shown) == index.num_frames >= 38
    assert shown[-20:] == list(range(30, 50))
    assert numbers(film_kit, path, [index.num_frames - 3]) == [47]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["mp4", "matroska", "mpegts"])
def test_truncated_films_give_what_is_there(film_kit, tmp_path, kind, share):
    options = {"g": "12", "bf": "2", "crf": "0"}
    whole = film_kit.write(tmp_path / "whole", 60, container=kind, options=options, width=320, height=240)
    if kind == "mp4":  # the list of frames in front, as in files made for streaming
        whole = faststart(whole, tmp_path / "fast")
    content = whole.read_bytes()
    path = tmp_path / f"half.{kind}"
    path.write_bytes(content[: int(len(content) * share)])
    index = decode.film_index(path)
    assert 0 < index.num_frames < 60 or share == 0.99
    shown = numbers(film_kit, path, np.arange(index.num_frames))
    assert len(shown) == index.num_frames
    sound = shown[: index.num_frames - 6]  # the very last may be smeared
    assert sound == list(range(len(sound)))


def faststart(source, target):
    with (
        av.open(str(source)) as given,
        av.open(str(target), "w", format="mp4", container_options={"movflags": "+faststart"}) as made,
    ):
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    return target


def test_a_hole_in_the_middle_shows_the_frame_before(film_kit, tmp_path):
    path = film_kit.write(tmp_path / "film.mp4", 60, options={"g": "6", "bf": "0", "x264-params": "scenecut=0"})
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as opened:
        stream = opened.streams.video[0]
        spots = [(p.pos, p.size) for p in opened.demux(stream) if p.dts is not None]
    for pos, size in spots[30:36]:
        content[pos : pos + size] = bytes(size)
    hurt = tmp_path / "hurt.mp4"
    hurt.write_bytes(content)
    shown = numbers(film_kit, hurt, np.arange(60))
    assert len(shown) == 60
    assert shown[:30] == list(range(30))
    assert shown[36:] == list(range(36, 60))
    assert numbers(film_kit, hurt, [33]) == [29]
    assert numbers(film_kit, hurt, [29, 40]) == [29, 40]


@pytest.mark.parametrize("quarter", [0, 90, 180, 270])
def test_rotation(film_kit, tmp_path, quarter):
    path = film_kit.write(tmp_path / "turned.mp4", 4, rotation=quarter)
    index = decode.film_index(path)
    frame = next(decode.iter_film(path, [3]))
    stored = film_kit.numbered(3)
    assert index.rotation == quarter
    assert frame.shape == ((80, 32, 3) if quarter % 180 else (32, 80, 3)) == (index.height, index.width, 3)
    assert film_kit.read_number(np.rot90(frame, -quarter // 90)) == 3
    assert abs(frame.astype(int) - np.rot90(stored, quarter // 90)).mean() < 8


def test_the_direction_of_rotation(film_kit, tmp_path):
    """A phone held upright writes the matrix (0, 1, -1, 0): show the stored picture turned clockwise."""
    path = film_kit.write(tmp_path / "turned.mp4", 2, rotation=0)
    content = bytearray(path.read_bytes())
    plain = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0" + bytes(12) + b"\x40\0\0\0"
    at = content.index(b"tkhd") + 4 + 4 + 20 + 16
    assert bytes(content[at : at + 36]) == plain
    content[at : at + 36] = bytes(4) + b"\0\1\0\0" + bytes(4) + b"\xff\xff\0\0" + bytes(16) + b"\x40\0\0\0"
    turned = tmp_path / "phone.mp4"
    turned.write_bytes(content)
    frame = next(decode.iter_film(turned, [1]))
    assert decode.film_index(turned).rotation == 270
    assert abs(frame.astype(int) - np.rot90(film_kit.numbered(1), -1)).mean() < 8  # rot90(-1) is clockwise


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "options"),
    [
        ("libx264", "yuv420p10le", {}),
        ("libx265", "yuv420p10le", {"x265-params": f"{HDR}:{X265}"}),
        ("libx264", "yuv444p", {}),
        ("libx264", "gray", {}),
    ],
)  # fmt: skip
def test_other_depths_become_eight_bit_rgb(film_kit, tmp_path, codec, pix_fmt, options):
    path = film_kit.write(tmp_path / "deep.mp4", 6, codec=codec, pix_fmt=pix_fmt, options=options)
    frames = list(decode.iter_film(path, range(6)))
    assert frames[0].dtype == np.uint8
    assert frames[0].shape == (32, 80, 3)
    assert [film_kit.read_number(f) for f in frames] == list(range(6))


def test_odd_sizes(film_kit, tmp_path):
    path = film_kit.write(tmp_path / "odd.mp4", 4, width=81, height=33, pix_fmt="yuv444p")
    assert next(decode.iter_film(path, [2])).shape == (33, 81, 3)


def test_no_picture(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as made:
        stream = made.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        made.mux(stream.encode(frame))
        made.mux(stream.encode())
    with pytest.raises(VideoError, match=r"sound\.mp4: there is no video in this file, only sound"):
        decode.film_index(path)


def test_a_header_without_frames(film, tmp_path):
    path = tmp_path / "head.mp4"
    content = film.read_bytes()
    path.write_bytes(content[: content.index(b"mdat")])
    with pytest.raises(VideoError, match=r"head\.mp4: "):
        decode.film_index(path)
    path.write_bytes(content[:40])
    with pytest.raises(VideoError, match=r"head\.mp4: "):
        decode.film_index(path)


def test_a_changed_file_is_read_again(film_kit, tmp_path):
    path = film_kit.write(tmp_path / "a.mp4", 5)
    assert decode.film_index(path).num_frames == 5
    film_kit.write(path, 9)
    assert decode.film_index(path).num_frames == 9


def test_memory_does_not_grow_with_the_film(film_kit, tmp_path):
    peaks = []
    for count in (100, 1000):
        path = film_kit.write(tmp_path / f"{count}.mp4", count, options={"preset": "ultrafast"})
        decode.film_index(path)
        tracemalloc.start()
        for _ in decode.iter_film(path, np.arange(count)):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000  # nine hundred more frames would be seven megabytes


def test_mutated_films_fail_in_one_way(film, tmp_path):
    """Flipped bytes give frames or a `VideoError`, nothing else."""
    content = film.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "hurt.mp4"
    outcomes = []
    for _ in range(60):
        hurt = bytearray(content)
        for at in rng.integers(0, len(hurt), 12):
            hurt[at] = rng.integers(256)
        path.write_bytes(hurt[: rng.integers(len(hurt) // 2, len(hurt))] if rng.random() < 0.3 else hurt)
        try:
            index = decode.film_index(path)
            outcomes.append(len(list(decode.iter_film(path, [0, index.num_frames - 1]))))
        except VideoError as error:
            outcomes.append(str(error).startswith(str(path)))
    assert set(outcomes) == {2, True}
