"""Several hosts read one row: each its own clips, and all the same of what could not be read."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import threading

import numpy as np
import pytest
from PIL import Image

from data_pipeline import layout, loader, sample, together
from data_pipeline.options import DataConfig
from data_pipeline.tokenizer import train_bpe
from hico_jax.batch import Geometry

GEOMETRY = Geometry(image_px=8, frames_per_clip=4, tokens_per_clip=4, tokens_per_image=4, max_length=512)
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "ball"}]


def half(host, count):
    """Two hosts: the first and the second half of a row's clips."""
    held = np.zeros(count, bool)
    held[host * (count // 2) : (host + 1) * (count // 2)] = True
    return held


class Table:
    """What hosts say to one another, in two threads."""

    def __init__(self, hosts):
        self.said, self.rounds = collections.defaultdict(dict), [0] * hosts
        self.changed = threading.Condition()

    def __call__(self, host, text):
        with self.changed:
            number, self.rounds[host] = self.rounds[host], self.rounds[host] + 1
            self.said[number][host] = text
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: len(self.said[number]) == len(self.rounds), 60)
            return [self.said[number][h] for h in range(len(self.rounds))]


def by_two_hosts(config, small):
    table, found = Table(2), {}

    def run(host):
        shared = together.Shared(lambda count: half(host, count), lambda text: table(host, text))
        try:
            found[host] = list(loader.make_loader(config, GEOMETRY, small, shared=shared))
        except ValueError as error:
            found[host] = error

    threads = [threading.Thread(target=run, args=(host,)) for host in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0], found[1]


@pytest.fixture(scope="module")
def small():
    return train_bpe(["What is seen? The video lasts for seconds, and frames are uniformly sampled from it."] * 4, 330)


@pytest.fixture
def data(tmp_path):
    """Six films of 16 frames as folders of pictures, of which every frame has its own colour."""
    items = []
    for i in range(6):
        folder = tmp_path / f"f{i}"
        folder.mkdir()
        for frame in range(16):
            Image.new("RGB", (8, 8), (10 * frame, 20 * i, 200)).save(folder / f"{frame:02}.png")
        items.append({"id": f"f{i}", "video": f"f{i}", "conversations": TALK})
    (tmp_path / "all.json").write_text(json.dumps(items))
    return DataConfig(
        annotations=str(tmp_path / "all.json"), data_root=str(tmp_path), batch_size=2, min_frames=16, max_frames=16,
        clip_buckets=(4, 8), read_threads=2, prefetch_rows=4, max_bad_fraction=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("changed", [{}, {"pack": 120}, {"clip_buckets": ()}, {"cache_mb": 8, "num_epochs": 2}])
def test_each_host_decodes_its_clips_and_together_they_are_the_film(data, small, changed, monkeypatch):
    decoded, plain = [], sample.read_clips
    monkeypatch.setattr(
        sample, "read_clips", lambda info, indices, *more: decoded.append(len(indices)) or plain(info, indices, *more)
    )
    config = dataclasses.replace(data, **changed)
    whole = list(loader.make_loader(config, GEOMETRY, small))
    alone = sum(decoded)
    left, right = by_two_hosts(config, small)
    # No frame twice in an epoch. How much a second epoch finds in the cache depends on who was faster.
    assert max(alone, sum(decoded) - alone) <= 6 * 16 * config.num_epochs
    for one, a, b in zip(whole, left, right, strict=True):
        assert one.info == a.info == b.info
        for name in ("tokens", "slots", "positions", "segments", "targets", "weights"):
            for part in (a, b):
                np.testing.assert_array_equal(getattr(part.batch, name), getattr(one.batch, name))
        middle = one.batch.clips.shape[1] // 2
        assert one.batch.clips.any(axis=(2, 3, 4, 5)).sum() > 0
        np.testing.assert_array_equal(a.batch.clips[:, :middle], one.batch.clips[:, :middle])
        np.testing.assert_array_equal(b.batch.clips[:, middle:], one.batch.clips[:, middle:])
        assert not a.batch.clips[:, middle:].any()
        assert not b.batch.clips[:, :middle].any()


@pytest.mark.parametrize("pack", [0, 120])
def test_what_one_host_cannot_read_is_masked_on_both(data, small, pack):
    """The last frames of a film lie in the second half of its row, when it has one to itself."""
    for frame in (14, 15):
        (pathlib.Path(data.data_root) / "f3" / f"{frame}.png").write_bytes(b"not a picture")
    left, right = by_two_hosts(dataclasses.replace(data, pack=pack), small)
    assert any("f3" in bad for m in left for bad in m.info.bad)
    for a, b in zip(left, right, strict=True):
        assert a.info == b.info
        np.testing.assert_array_equal(a.batch.weights, b.batch.weights)
        np.testing.assert_array_equal(a.batch.targets, b.batch.targets)
        np.testing.assert_array_equal(a.batch.slots, b.batch.slots)
        learnt = sum(len(np.unique(s[w > 0])) for s, w in zip(a.batch.segments, a.batch.weights, strict=True))
        assert learnt == len(a.info.ids) - len(a.info.bad)


def test_hosts_that_see_other_files_stop(small):
    row = layout.row([5, 6], [5, 6], [], GEOMETRY)
    other = layout.row([5, 7], [5, 7], [], GEOMETRY)
    said = []
    together.agreed([other], [("/data/a.mp4: no such file",)], lambda text: said.append(text) or [text])
    with pytest.raises(ValueError, match=r"hosts read different data: host 0 .*\(/data/a.mp4: no such file\); let all"):
        together.agreed([row], [("",)], lambda text: [said[0], text])


def test_a_masked_conversation_keeps_its_place():
    rows = [layout.row([5, 6], [5, 6], [], GEOMETRY), layout.row([7, 8], [7, 8], [], GEOMETRY)]
    packed = layout.pack(rows, GEOMETRY)
    assert together.masked(packed, []) is packed
    found = together.masked(packed, [2])
    assert found.labels.tolist() == [5, 6, -100, -100]
    assert found.tokens.tolist() == packed.tokens.tolist()
