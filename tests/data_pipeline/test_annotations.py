from __future__ import annotations

import json

import pytest
import yaml

from data_pipeline import annotations
from data_pipeline.annotations import read_annotations, take

FILE = "G_preprocess_data_yaml.json"
TURNS = [{"from": "human", "value": "q one"}, {"from": "gpt", "value": "a"}]


@pytest.fixture
def recorded(golden, tmp_path):
    stored = golden.json(FILE)
    (tmp_path / "root").mkdir()
    for name, items in stored["files"].items():
        text = json.dumps(items) if name.endswith(".json") else "\n".join(map(json.dumps, items)) + "\n"
        (tmp_path / name).write_text(text)
        for item in items:
            media = item.get("image", item.get("video", []))
            for one in [media] if isinstance(media, str) else media:
                (tmp_path / "root" / one).touch()
    return stored, tmp_path


def test_recorded_selections(recorded):
    stored, folder = recorded
    for case in stored["rows"]:
        entry = {"json_path": f"{folder}/{case['file']}"}
        entry |= {k: case[k] for k in ("sampling_strategy", "data_root", "video_read_type") if k in case}
        entry["data_root"] = entry.get("data_root", "").replace("<TMP>", str(folder))
        path = folder / "one.yaml"
        path.write_text(yaml.safe_dump({"datasets": [entry]}))
        if "error" in case:
            assert case["sampling_strategy"].startswith("random")  # ours takes a seeded choice instead
            assert len(read_annotations(path)) == min(3, case["n"])
            continue
        if not case["ids"]:
            with pytest.raises(ValueError, match="no sample is left"):
                read_annotations(path)
            continue
        samples = read_annotations(path)
        assert [s.id for s in samples] == case["ids"], case
        if "first_media" in case:
            assert samples[0].paths[0] == case["first_media"].replace("<TMP>", str(folder))
            assert samples[0].reader == case["first_video_read_type"]
        if "lengths" in case:
            assert [s.length(16) for s in samples] == case["lengths"]
            assert [s.modality_length for s in samples] == case["modality_lengths"]


def test_recorded_mixture(recorded):
    stored, folder = recorded
    for case in stored["combined"]:
        path = folder / "all.yaml"
        path.write_text(case["yaml"].replace("<TMP>", str(folder)))
        samples = read_annotations(path)
        assert [s.id for s in samples] == case["ids"]
        media = []
        for s in samples:
            many = len(s.paths) > 1
            media.append(str(list(s.paths)) if many else s.paths[0] if s.paths else "None")
        assert media == [m.replace("<TMP>", str(folder)) for m in case["media"]]
        assert [s.length(case["frames_upbound"]) for s in samples] == case["lengths"]
        assert [s.modality_length for s in samples] == case["modality_lengths"]


def test_amounts():
    items = list(range(10))
    assert take(items, "first:25%") == [0, 1, 2]
    assert take(items, "first4:3") == [9]
    assert take(items, "end:0") == items
    chosen = take(items, "random:4", seed=1)
    assert chosen == take(items, "random:4", seed=1) == sorted(set(chosen))
    assert any(take(items, "random:4", seed=s) != chosen for s in range(2, 6))
    for bad in ("first", "first:-1", "first:x%", "last:3", "first5:1"):
        with pytest.raises(ValueError, match="sampling_strategy"):
            take(items, bad)


def write(folder, items, **entry):
    (folder / "a.json").write_text(json.dumps(items))
    (folder / "a.yaml").write_text(yaml.safe_dump({"datasets": [{"json_path": "a.json", **entry}]}))
    return folder / "a.yaml"


@pytest.mark.parametrize("name", ["../secret.mp4", "/etc/passwd", "a/../../b.mp4", "x\0.mp4"])
def test_media_stay_inside_their_root(tmp_path, name):
    path = write(tmp_path, [{"video": name, "conversations": TURNS}], data_root="videos")
    with pytest.raises(ValueError, match=r"a\.json, item 0: the media path .* leaves its data_root 'videos'"):
        read_annotations(path)


def test_roots(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    items = [{"video": "a.mp4", "conversations": TURNS, "start": 1, "end": "2.5"}]
    (sample,) = read_annotations(write(tmp_path, items, data_root="videos"))
    assert sample.paths == (str(tmp_path / "videos" / "a.mp4"),)
    assert (sample.start, sample.end, sample.id) == (1.0, 2.5, "a.json:0")
    assert read_annotations(write(tmp_path, items), data_root="videos")[0].paths == sample.paths
    written = [{"video": str(tmp_path / "videos" / "a.mp4"), "conversations": TURNS}]
    assert read_annotations(write(tmp_path, written))[0].paths == sample.paths
    assert read_annotations(tmp_path / "a.json")[0].paths == sample.paths


@pytest.mark.parametrize(
    ("items", "entry", "fault"),
    [
        ({"a": 1}, {}, "expected a list of samples"),
        ([{"video": "v.mp4"}], {}, r"a\.json, item 0: expected an object with a list `conversations`"),
        ([{"conversations": ["hi"]}], {}, "every turn of `conversations`"),
        ([{"video": 3, "conversations": TURNS}], {}, "'video' must be a path"),
        ([{"image": [], "conversations": TURNS}], {}, "'image' must be a path"),
        ([{"video": "v.mp4", "conversations": TURNS}], {}, r"v\.mp4 does not exist"),
        ([{"video": "v.mp4", "conversations": TURNS}], {"video_read_type": "vlc"}, "video_read_type is 'vlc'"),
        ([{"video": "v.mp4", "start": "soon", "conversations": TURNS}], {}, "could not convert"),
        ([{"conversations": TURNS}], {"media_type": "sound"}, "media_type is 'sound'"),
        ([{"conversations": TURNS}], {"sampling_strategy": "some"}, r"a\.yaml, dataset 0: sampling_strategy 'some'"),
        ([{"conversations": TURNS}], {"sampling": "all"}, r"unknown keys \['sampling'\]"),
        ([], {}, "no sample is left"),
    ],
)
def test_faults_name_file_and_entry(tmp_path, items, entry, fault):
    with pytest.raises(ValueError, match=fault):
        read_annotations(write(tmp_path, items, **entry))


def test_broken_files(tmp_path):
    with pytest.raises(ValueError, match="no such annotation file"):
        read_annotations(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"must be a \.yaml"):
        read_annotations(tmp_path / "none.txt")
    (tmp_path / "b.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: not JSON"):
        read_annotations(tmp_path / "b.jsonl")
    (tmp_path / "c.yaml").write_text("datasets: 3")
    with pytest.raises(ValueError, match="a list `datasets`"):
        read_annotations(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="this YAML cannot be read"):
        read_annotations(tmp_path / "c.yaml")
    assert annotations.MEDIA == ("image", "video", "text")


def test_a_damaged_item_keeps_its_place_and_tells_why(tmp_path):
    lines = [
        json.dumps({"id": "a", "conversations": TURNS}).encode(),
        b'{"id": "b", "conversations": [',
        b'{"id": "\xff"}',
        json.dumps({"id": "d", "video": "v.mp4", "conversations": TURNS, "start": float("nan")}).encode(),
        json.dumps({"id": "e\ud800", "image": 3, "conversations": TURNS}).encode(),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        read_annotations(tmp_path / "a.jsonl")
    found = read_annotations(tmp_path / "a.jsonl", strict=False)
    assert [s.id for s in found] == ["a", "a.jsonl:1", "a.jsonl:2", "d", "e?"]
    assert [s.media for s in found] == ["text", "text", "text", "video", "image"]
    for sample, fault in zip(
        found, ["", "line 2: not JSON", "line 3: not JSON", "not finite", "'image' must"], strict=True
    ):
        assert fault in sample.fault
        assert bool(sample.fault) == bool(fault)
