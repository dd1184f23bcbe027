from __future__ import annotations

import pytest

from data_pipeline.containers import VideoError, guard, sniff


def test_real_files(videos):
    kinds = {p.name: sniff(p) for p in videos.iterdir() if p.is_file()}
    assert kinds["animated.gif"] == "gif"
    assert kinds["av1_video.mkv"] == kinds["testsrc2_vp9.webm"] == "matroska"
    assert {kinds[n] for n in ("bikes.mp4", "h265_video.mp4", "bigbuckbunny.mp4", "nasa_13013.mp4")} == {"mov"}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "the file is empty"),
        (b"ffconcat version 1.0\nfile 'other.mp4'\n", "a playlist or a list of other files"),
        (b"#EXTM3U\n#EXTINF:1,\nother.ts\n", "a playlist or a list of other files"),
        (b"\xef\xbb\xbf#EXTM3U\n", "a playlist or a list of other files"),
        (b"<?xml version='1.0'?><MPD/>", "a playlist or a list of other files"),
        (b"hello, this is text", "this is a text file"),
        (b"\0\1\2\3garbage", "not a container this reader knows"),
        (b"RIFF\0\0\0\0WAVEfmt ", "not a container this reader knows"),
    ],
)
def test_what_a_name_claims_does_not_count(tmp_path, content, fault):
    path = tmp_path / "film.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=rf"film\.mp4: .*{fault}"):
        sniff(path)


def test_missing_and_odd_paths(tmp_path):
    with pytest.raises(VideoError, match=r"none\.mp4: no such file"):
        sniff(tmp_path / "none.mp4")
    assert sniff(tmp_path) == "folder"
    for url in ("concat:a.mp4|b.mp4", "http://example.invalid/a.mp4", "file:a.mp4"):
        with pytest.raises(VideoError, match="no such file"):
            sniff(url)
    with pytest.raises(VideoError, match="not a regular file"):
        sniff("/dev/null")


def test_every_leaked_error_becomes_one():
    for error in (EOFError(), IndexError("x"), MemoryError(), UnicodeDecodeError("u", b"", 0, 1, "r"), ValueError("y")):
        with (
            pytest.raises(VideoError, match=r"a\.mp4: reading failed \(.+\); the file is damaged"),
            guard("a.mp4", "reading"),
        ):
            raise error
    with pytest.raises(VideoError, match="kept"), guard("a.mp4", "reading"):
        raise VideoError("kept")
    with pytest.raises(KeyboardInterrupt), guard("a.mp4", "reading"):
        raise KeyboardInterrupt
