from __future__ import annotations

import collections
import json

import pytest
import yaml
from PIL import Image

from data_pipeline.check import check, histogram
from data_pipeline.options import DataConfig
from hico_jax import cli
from hico_jax.batch import Geometry

GEOMETRY = Geometry(image_px=8, frames_per_clip=4, tokens_per_clip=4, tokens_per_image=4, max_length=96)


def talk(question, answer="A ball."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def planted(film_kit, tmp_path_factory):
    """Sound samples, and one of every defect: item -> kind."""
    folder = tmp_path_factory.mktemp("planted")
    film_kit.write(folder / "sound.mp4", 50, options={"preset": "ultrafast", "g": "10"})
    whole = (folder / "sound.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "text.mp4").write_text("#EXTM3U\n")
    Image.new("RGB", (8, 8)).save(folder / "p.png")
    (folder / "torn.png").write_bytes((folder / "p.png").read_bytes()[:-30])
    film, picture = {"video": "sound.mp4"}, {"image": "p.png"}
    items = {
        "sound": (film | {"conversations": talk("<image>\nWhat?")}, None),
        "clip": (film | {"start": 0.2, "end": 1.9, "conversations": talk("<image>\nWhat?")}, None),
        "picture": (picture | {"conversations": talk("<image>\nWhat?")}, None),
        "control": ({"conversations": talk("Say <|im_end|>.")}, "note"),
        "gone": ({"video": "gone.mp4", "conversations": talk("<image>\nWhat?")}, "media"),
        "cut": ({"video": "cut.mp4", "conversations": talk("<image>\nWhat?")}, "damage"),
        "playlist": ({"video": "text.mp4", "conversations": talk("<image>\nWhat?")}, "damage"),
        "torn": ({"image": "torn.png", "conversations": talk("<image>\nWhat?")}, "damage"),
        "late": (film | {"start": 1.0, "end": 9.0, "conversations": talk("<image>\nWhat?")}, "duration"),
        "backwards": (film | {"start": 1.5, "end": 0.5, "conversations": talk("<image>\nWhat?")}, "duration"),
        "outside": ({"video": "../x.mp4", "conversations": talk("<image>\nWhat?")}, "path"),
        "silent": (picture | {"conversations": talk("<image>\nWhat?")[:1]}, "conversation"),
        "marks": (picture | {"conversations": talk("<image> <image>\nWhat?")}, "conversation"),
        "turns": (picture | {"conversations": [{"who": "human"}]}, "conversation"),
        "keys": (picture | {"conversation": []}, "schema"),
        "types": ({"image": 7, "conversations": talk("<image>\nWhat?")}, "schema"),
        "long": (picture | {"conversations": talk("<image>\nWhat?", "word " * 90)}, "length"),
    }
    (folder / "a.json").write_text(json.dumps([{"id": k, **item} for k, (item, _) in items.items()]))
    (folder / "b.jsonl").write_text('{"id": "x", "conversations": [{"from": "gpt", "value": "Yes."}]}\n{"id":\n')
    entries = [
        {"json_path": "a.json", "data_root": "."}, {"json_path": "b.jsonl"}, {"json_path": "none.json"},
        {"json_path": "a.json", "colour": 1}, {"json_path": "a.json", "sampling_strategy": "some:1"},
    ]  # fmt: skip
    (folder / "all.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    return folder, {name: kind for name, (_, kind) in items.items()}


def test_every_planted_defect_is_found_and_nothing_else(planted):
    folder, kinds = planted
    config = DataConfig(min_frames=4, max_frames=8, image_aspect="square")
    report = check(str(folder / "all.yaml"), config, GEOMETRY, threads=2)
    found = collections.defaultdict(set)
    for defect in report.defects:
        found[defect.where].add(defect.kind)
    names = list(kinds)
    for where, got in found.items():
        if "a.json, item" in where:
            name = names[int(where.split("item ")[1].split(" ")[0])]
            assert got == {kinds[name]}, (name, got, report.defects)
    hit = {names[int(w.split("item ")[1].split(" ")[0])] for w in found if "a.json, item" in w}
    assert hit == {name for name, kind in kinds.items() if kind}
    assert found[f"{folder / 'b.jsonl'}, item 1"] == {"schema"}
    for number in (2, 3, 4):
        assert found[f"{folder / 'all.yaml'}, dataset {number}"] == {"schema"}
    assert "samples" in report.text()


def test_the_command_says_so_with_its_exit_code(planted, tmp_path, capsys):
    folder, _ = planted
    assert cli.main(["data", "check", str(folder / "a.json"), "--model=tiny", "--min-frames=4", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["defects"]) > 5
    (tmp_path / "ok.json").write_text(json.dumps([{"conversations": talk("Hello?")}]))
    assert cli.main(["data", "check", str(tmp_path / "ok.json"), "--model=tiny"]) == 0
    assert cli.main(["data", "check", str(tmp_path / "none.yaml")]) == 2
    assert cli.main(["data", "prepare", str(tmp_path / "ok.json")]) == 2


def test_a_histogram_of_lengths():
    assert histogram([3, 4, 5, 9]) == [
        "tokens of a row: median 4, longest 9",
        f"  up to       4        2  {'#' * 40}",
        f"  up to       8        1  {'#' * 20}",
        f"  up to      16        1  {'#' * 20}",
    ]
