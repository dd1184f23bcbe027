from __future__ import annotations

import collections
import json
import pathlib
import re
from typing import Any

import av
import numpy as np
import pytest
import yaml
from PIL import Image

from data_pipeline.world import make
from data_pipeline.world.draw import frame
from data_pipeline.world.presets import PRESETS
from data_pipeline.world.scene import COLOURS

ANSWER_SHEETS = ("val.json", "val_long.json", "test.json", "test_long.json")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("world")
    make.make_world(folder, preset="tiny")
    return folder


def _items(path: pathlib.Path) -> list[dict[str, Any]]:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def _texts(root: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(root.iterdir()) if p.is_file()}


def test_a_second_call_does_nothing(root: pathlib.Path):
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    world = make.make_world(root, preset="tiny")
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    assert world == json.loads((root / "world.json").read_text())


def test_an_interrupted_call_goes_on_and_ends_the_same(root: pathlib.Path, tmp_path: pathlib.Path):
    class Killed(Exception):
        pass

    def stop_after_five(done: int, total: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        make.make_world(tmp_path, preset="tiny", workers=1, progress=stop_after_five)
    assert not (tmp_path / "world.json").exists()
    written = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*")}
    assert len(written) == 5
    counts: list[tuple[int, int]] = []
    make.make_world(tmp_path, preset="tiny", workers=1, progress=lambda done, total: counts.append((done, total)))
    assert {p: p.stat().st_mtime_ns for p in written} == written, "what was whole is kept"
    total = counts[-1][1]
    assert counts == [(done, total) for done in range(5, total + 1)]
    assert _texts(tmp_path) == _texts(root), "annotations are byte for byte the same, however the world was made"
    assert {p.name for p in (tmp_path / "videos").iterdir()} == {p.name for p in (root / "videos").iterdir()}


def test_another_world_in_the_same_folder_is_refused(root: pathlib.Path):
    with pytest.raises(ValueError, match="holds another world"):
        make.make_world(root, preset="tiny", seed=1)
    with pytest.raises(ValueError, match="preset is 'huge'"):
        make.make_world(root, preset="huge")


def test_another_seed_is_another_world():
    first, other = (make.plan(PRESETS["tiny"], seed) for seed in (0, 1))
    assert not {m.scene.seed for m in first} & {m.scene.seed for m in other}


@pytest.mark.parametrize("preset", PRESETS)
def test_splits_are_disjoint(preset: str):
    seeds = collections.defaultdict(set)
    grounds = collections.defaultdict(set)
    for m in make.plan(PRESETS[preset], 0):
        assert m.scene.seed not in seeds[m.split]
        seeds[m.split].add(m.scene.seed)
        grounds[m.split] |= {g.seed for g in m.scene.grounds}
    for table in (seeds, grounds):
        assert not table["train"] & table["val"]
        assert not (table["train"] | table["val"]) & table["test"]


def test_every_item_has_the_form_of_the_reference(root: pathlib.Path):
    world = json.loads((root / "world.json").read_text())
    assert all(world["items"][name] for name in ("stage3_short.json", "text.jsonl", *ANSWER_SHEETS))
    for name, number in world["items"].items():
        items = _items(root / name)
        assert len(items) == number
        for item in items:
            assert set(item) <= {"id", "image", "video", "conversations", "kind", "answer"}
            assert not ("image" in item and "video" in item)
            media = item.get("image", item.get("video", []))
            media = [media] if isinstance(media, str) else media
            assert all((root / ("images" if "image" in item else "videos") / m).is_file() for m in media)
            turns = item["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert len(turns) >= 2
            assert turns[0]["value"].count("<image>") == len(media)
            assert not any("<image>" in t["value"] for t in turns[1:])
            assert all(t["value"] for t in turns)
        assert len({item["id"] for item in items}) == len(items)


def test_stage_one_is_plain_captions(root: pathlib.Path):
    for name in ("stage1_images.json", "stage1_videos.json"):
        assert all(len(item["conversations"]) == 2 for item in _items(root / name))


def test_answer_sheets_hold_one_question_an_item(root: pathlib.Path):
    for name in ANSWER_SHEETS:
        for item in _items(root / name):
            assert len(item["conversations"]) == 2
            assert item["conversations"][1]["value"] == item["answer"]
            assert item["video"].startswith(name.split("_")[0].removesuffix(".json"))


def test_stage_lists_name_files_that_exist(root: pathlib.Path):
    for stage in ("stage1", "stage2", "stage3", "stage4", "short"):
        datasets = yaml.safe_load((root / f"{stage}.yaml").read_text())["datasets"]
        assert datasets
        for entry in datasets:
            assert set(entry) <= {"json_path", "sampling_strategy", "data_root"}
            assert re.fullmatch(r"all|(first|end):\d+%?", entry["sampling_strategy"])
            first = _items(root / entry["json_path"])[0]
            assert ("data_root" in entry) == ("image" in first or "video" in first)
            assert "val" not in entry["json_path"]
            assert "test" not in entry["json_path"]


def test_videos_show_their_scenes(root: pathlib.Path):
    for m in make.plan(PRESETS["tiny"], 0):
        if m.group == "image":
            picture = np.asarray(Image.open(root / m.path))
            assert np.abs(picture.astype(int) - frame(m.scene, 0)).mean() < 8, m.path
            continue
        with av.open(str(root / m.path)) as container:
            assert float(container.streams.video[0].average_rate or 0) == m.scene.fps
            decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert len(decoded) == m.scene.num_frames
        for i in range(0, m.scene.num_frames, 3):
            # The encoder blurs the sensor noise and the colour of edges.
            assert np.abs(decoded[i].astype(int) - frame(m.scene, i)).mean() < 12, (m.path, i)


def test_answers_are_those_of_the_ground_truth(root: pathlib.Path):
    truth = {s["path"].split("/")[1]: s for s in map(json.loads, (root / "scenes.jsonl").read_text().splitlines())}
    checked = 0
    for item in _items(root / "stage3_short.json"):
        turns = item["conversations"]
        for ask, reply in zip(turns[::2], turns[1::2], strict=True):
            if ask["value"].removeprefix("<image>\n") == "What colour is the card?":
                assert [c["colour"] for c in truth[item["video"]]["cards"]] == [reply["value"]]
                checked += 1
    assert checked


def test_nano_asks_about_everything_evenly():
    preset = PRESETS["nano"]
    files = make.annotate(preset, 0, make.plan(preset, 0))
    asked: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for item in files["stage3_short.json"]:
        turns = [t["value"] for t in item["conversations"]]
        for ask, reply in zip(turns[::2], turns[1::2], strict=True):
            asked[ask.removeprefix("<image>\n")][reply] += 1
    colours = asked["What colour is the card?"]
    assert set(colours) == set(COLOURS)
    total = sum(colours.values())
    assert total > 1200, "the main skill has most of the questions"
    assert max(colours.values()) < 1.4 * total / 8, "no answer can be guessed"
    for word in ("first", "second"):
        assert set(asked[f"What colour is the {word} card?"]) == set(COLOURS)


def test_workers_write_the_same_files(root: pathlib.Path, tmp_path: pathlib.Path):
    make.make_world(tmp_path, preset="tiny", workers=2)
    assert _texts(tmp_path) == _texts(root)
    for path in (root / "videos").iterdir():
        assert (tmp_path / "videos" / path.name).read_bytes() == path.read_bytes()
