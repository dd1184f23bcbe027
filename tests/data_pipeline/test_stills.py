from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_pipeline import stills
from data_pipeline.containers import VideoError


def coloured(value, size=(6, 4)):
    return Image.new("RGB", size, (value, value, value))


def test_a_real_gif(videos):
    path = str(videos / "animated.gif")
    count, width, height = stills.gif_size(path)
    assert (count, width, height) == (4, 64, 48)
    frames = list(stills.iter_gif(path, range(4)))
    assert len({f.tobytes() for f in frames}) == 4
    with Image.open(path) as image:
        image.seek(2)
        assert (frames[2] == np.asarray(image.convert("RGB"))).all()


def test_transparency_is_dropped(tmp_path):
    """The colour under the transparent part shows, as in the reference, not white."""
    frames = []
    for value in (1, 2):
        picture = Image.new("P", (6, 4), value)
        picture.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
        picture.paste(0, (0, 0, 3, 4))
        frames.append(picture)
    path = str(tmp_path / "clear.gif")
    frames[0].save(path, save_all=True, append_images=frames[1:], transparency=0, disposal=2)
    first, second = stills.iter_gif(path, [0, 1])
    assert first.shape == second.shape == (4, 6, 3)
    assert first[0, 5].tolist() == [200, 10, 10]
    assert first[0, 0].tolist() == [0, 0, 0]
    assert second[0, 5].tolist() == [10, 200, 10]


def test_frames_smaller_than_the_canvas(tmp_path):
    """A GIF may store only the part that changes; every frame shown has the size of the canvas."""
    base = coloured(10, (8, 8))
    changed = base.copy()
    changed.paste((200, 0, 0), (2, 2, 4, 4))
    path = str(tmp_path / "part.gif")
    base.save(path, save_all=True, append_images=[changed])
    frames = list(stills.iter_gif(path, [0, 1, 1]))
    assert [f.shape for f in frames] == [(8, 8, 3)] * 3
    assert frames[1][3, 3, 0] > 150 > frames[0][3, 3, 0]
    assert (frames[1] == frames[2]).all()


def test_a_broken_gif(tmp_path, videos):
    path = tmp_path / "half.gif"
    path.write_bytes((videos / "animated.gif").read_bytes()[:300])
    with pytest.raises(VideoError, match=r"half\.gif"):
        list(stills.iter_gif(str(path), range(4)))


def test_folder_order_and_rate(tmp_path):
    for name in ("frame_10.jpg", "frame_2.png", "frame_1.jpeg", "cover.jpg", ".hidden_3.jpg", "notes.txt"):
        (tmp_path / name).touch()
    names = [f.rsplit("/", 1)[1] for f in stills.folder_files(str(tmp_path))]
    assert names == ["cover.jpg", "frame_1.jpeg", "frame_2.png", "frame_10.jpg"]  # no number comes first
    assert stills.folder_fps("/data/TVQA/frames_hq/a") == 3.0
    assert stills.folder_fps("/data/other") == 1.0


def test_folder_frames(tmp_path):
    for i in range(3):
        coloured(50 * i).save(tmp_path / f"f_{i}.png")
    files = stills.folder_files(str(tmp_path))
    assert [int(f[0, 0, 0]) for f in stills.iter_folder(files, [0, 2, 2])] == [0, 100, 100]
    exif = Image.Exif()
    exif[0x0112] = 6
    coloured(9).save(tmp_path / "turned_1.jpg", exif=exif)
    (turned,) = stills.iter_folder([str(tmp_path / "turned_1.jpg")], [0])
    assert turned.shape == (6, 4, 3)  # OpenCV, which the reference uses for folders, turns it


def test_bad_folders(tmp_path):
    with pytest.raises(VideoError, match=r"holds no \.jpg"):
        stills.folder_files(str(tmp_path))
    (tmp_path / "f_1.jpg").write_text("not a picture")
    with pytest.raises(VideoError, match=r"f_1\.jpg: reading failed"):
        list(stills.iter_folder(stills.folder_files(str(tmp_path)), [0]))


def test_a_picture_is_a_film_of_one_frame(tmp_path):
    coloured(7).save(tmp_path / "a.png")
    frames = list(stills.iter_picture(str(tmp_path / "a.png"), [0, 0]))
    assert [f.shape for f in frames] == [(4, 6, 3)] * 2
