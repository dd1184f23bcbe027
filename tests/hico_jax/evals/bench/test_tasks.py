"""What is read of official files, and what happens to records that are not as they should be."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from hico_jax.evals.bench import tasks

BENCHMARKS = tasks.BENCHMARKS
NUMBERS = {"mvbench": 8, "mlvu": 7, "lvbench": 8, "charades_sta": 2}


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_benchmark_reads_its_files(items: Any, name: str) -> None:
    found = items(name)
    assert len(found) == NUMBERS.get(name, 4)
    assert len({item.id for item in found}) == len(found)
    assert not any(item.fault or item.note for item in found)
    assert all(pathlib.Path(item.video).exists() for item in found)
    if BENCHMARKS[name].span:
        assert all(item.span and item.span[0] < item.span[1] for item in found)
    else:
        assert all(item.expected in "ABCDE"[: len(item.options)] for item in found)


def test_parts_and_folders_of_frames(items: Any) -> None:
    sequence = [item for item in items("mvbench") if item.groups["task"] == "action_sequence"]
    assert {(item.start, item.end) for item in sequence} == {(0.0, 6.0)}
    assert all(pathlib.Path(item.video).is_dir() for item in items("lvbench"))
    assert {item.groups["task"] for item in items("lvbench")} == {"cartoon", "tv"}


def test_subtitles_are_in_the_prompt(items: Any) -> None:
    assert all("\nThis is film" in item.prompt for item in items("longvideobench"))
    assert not any("Nobody hears" in item.prompt for item in items("longvideobench"))
    heads = [item.prompt.split("\n")[0] for item in items("videomme_w_subtitle")]
    assert heads.count("This video's subtitles are listed below: ") == 2
    assert heads.count("") == 2
    assert not any("subtitles" in item.prompt for item in items("videomme"))


@pytest.mark.parity
def test_the_harness_settings_are_the_recorded_ones(golden: Any) -> None:
    names = {
        "mvbench": "mvbench_action_count", "mlvu": "mlvu_mc_count", "lvbench": "lvbench_tv", "videomme": "videomme",
        "videomme_w_subtitle": "videomme_w_subtitle", "charades_sta": "temporal_grounding_charades",
        "longvideobench": "longvideobench_val_v", "perceptiontest": "perceptiontest_val_mc",
    }  # fmt: skip
    recorded = golden.json("H_eval_task_settings.json")
    for ours, theirs in names.items():
        given = recorded[theirs]["generation_kwargs"] or {}
        assert BENCHMARKS[ours].max_new_tokens == given.get("max_new_tokens", 1024), ours
    tasks_there = {k.removeprefix("mvbench_") for k in recorded if k.startswith("mvbench_")}
    assert tasks_there == set(tasks.MVBENCH)
    assert {recorded[k]["kwargs"]["sub_task"] for k in recorded if k.startswith("mlvu_mc_")} == set(tasks.MLVU)


@pytest.mark.parity
def test_media_and_keys_as_recorded(golden: Any, tmp_path: pathlib.Path) -> None:
    """What is shown of a video, and how a submission names a question."""
    sources = tasks.Sources(tmp_path, tmp_path)
    for name in ("mvbench", "mlvu", "lvbench"):
        for case in golden.json(f"H_eval_{name}.json")["docs"]:
            task = pathlib.PurePath(case["file"]).stem
            made = BENCHMARKS[name].make(case["doc"], task, sources)
            assert made["prompt"] == case["doc_to_text"]
            media = case["media_dict"]
            assert (made.get("start"), made.get("end")) == (media.get("start"), media.get("end"))
            if name == "mvbench":  # LVBench's folders are known by being folders
                assert made["reader"] == (media["video_read_type"] if media["video_read_type"] == "img" else None)
    for case in golden.json("H_eval_temporal_grounding.json")["docs"]:
        assert BENCHMARKS["charades_sta"].make(case["doc"], "charades", sources)["key"] == case["submission_key"]


def write(folder: pathlib.Path, *records: Any) -> tasks.Sources:
    (folder / "videos").mkdir()
    (folder / "videos" / "v.mp4").touch()
    (folder / "action_count.json").write_text(json.dumps(records))
    return tasks.Sources(folder, folder / "videos")


GOOD = {"video": "v.mp4", "question": "Who?", "candidates": ["x", "y"], "answer": "y"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": None}, "its field 'question' is None"),
        ({"candidates": ["x"]}, "at least 2 texts were expected"),
        ({"candidates": "xy"}, "its field 'candidates' is 'xy'"),
        ({"answer": True}, "its field 'answer' is True"),
        ({"start": "soon"}, "its field 'start' is 'soon'; a number"),
        ({"video": "../../etc/passwd"}, "points outside the folder of videos"),
        ({"video": "/etc/passwd"}, "points outside the folder of videos"),
    ],
)
def test_a_faulty_record_is_named_and_kept(tmp_path: pathlib.Path, changes: dict[str, Any], words: str) -> None:
    found = tasks.read(BENCHMARKS["mvbench"], write(tmp_path, GOOD, GOOD | changes))
    assert [bool(item.fault) for item in found] == [False, True]
    assert "action_count.json[1]" in found[1].fault
    assert words in found[1].fault


def test_a_missing_field_is_named(tmp_path: pathlib.Path) -> None:
    record = {k: v for k, v in GOOD.items() if k != "question"}
    found = tasks.read(BENCHMARKS["mvbench"], write(tmp_path, record, GOOD, "text"))
    assert "its field 'question' is missing" in found[0].fault
    assert "it is a str, not a record" in found[2].fault
    assert found[2].id == "action_count/2"


def test_an_answer_that_is_no_option_is_asked_and_noted(tmp_path: pathlib.Path) -> None:
    (found,) = tasks.read(BENCHMARKS["mvbench"], write(tmp_path, GOOD | {"answer": "z"}))
    assert "its answer is not among the options" in found.note
    assert found.expected == ""
    assert not found.fault
    for judge in (BENCHMARKS["mvbench"].reference, tasks.strict):
        assert judge(found, "A").score == 0


def test_repeated_ids_are_told_apart(tmp_path: pathlib.Path) -> None:
    sources = write(tmp_path)
    record = {
        "question_id": "7-1", "videoID": "v", "question": "Who?", "options": ["A. x", "B. y"], "answer": "B",
        "duration": "short", "domain": "d", "sub_category": "s", "task_type": "t",
    }  # fmt: skip
    (tmp_path / "test.jsonl").write_text(f"{json.dumps(record)}\n\n{json.dumps(record)}\n")
    found = tasks.read(BENCHMARKS["videomme"], sources)
    assert [item.id for item in found] == ["7-1", "7-1#2"]
    assert "is used before" in found[1].note


def test_charades_with_a_span_that_ends_before_it_starts(tmp_path: pathlib.Path) -> None:
    sources = write(tmp_path)
    records = [{"video": "v.mp4", "caption": "c.", "timestamp": t} for t in ([1, 3], [3, 1], [1], "x")]
    (tmp_path / "charades_test.json").write_text(json.dumps(records))
    faults = [item.fault for item in tasks.read(BENCHMARKS["charades_sta"], sources)]
    assert [bool(f) for f in faults] == [False, True, True, True]
    assert "ends at 1 s before it starts at 3 s" in faults[1]


def test_perceptiontest_in_its_own_layout(tmp_path: pathlib.Path) -> None:
    sources = write(tmp_path)
    question = {"id": 3, "question": "Who?", "options": ["x", "y", "z"], "answer_id": 2, "area": "physics"}
    (tmp_path / "mc_question_valid.json").write_text(json.dumps({"video_1": {"mc_question": [question]}}))
    (found,) = tasks.read(BENCHMARKS["perceptiontest"], sources)
    assert (found.id, found.expected, found.groups["area"]) == ("video_1/3", "C", "physics")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "action_sequence.json was looked for first"), ("{", "not readable as json"), ("[]", "list of 0"),
        ('{"a": 1}', "a list of questions was expected"), ("[1, 2]", "none of the 2 records can be asked"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: pathlib.Path, content: str | None, words: str) -> None:
    sources = write(tmp_path)
    path = tmp_path / "action_count.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        tasks.read(BENCHMARKS["mvbench"], sources)


def test_folders_that_are_not_there(tmp_path: pathlib.Path) -> None:
    sources = write(tmp_path, GOOD)
    with pytest.raises(ValueError, match="no such folder of videos"):
        tasks.read(BENCHMARKS["mvbench"], dataclasses.replace(sources, videos=tmp_path / "gone"))
    with pytest.raises(ValueError, match="no such annotation file"):
        tasks.read(BENCHMARKS["mvbench"], dataclasses.replace(sources, annotations=tmp_path / "gone.json"))
    with pytest.raises(ValueError, match="--subtitles"):
        tasks.read(BENCHMARKS["longvideobench"], sources)
