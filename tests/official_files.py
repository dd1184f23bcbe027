"""Tiny files in the official format of every benchmark, about videos of the made-up world.

    python tests/official_files.py FOLDER [--films 12] [--seconds 16]

In: a folder. Out: `FOLDER/NAME/` with annotations, videos and subtitles laid out as they are published.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from typing import Any

import numpy as np

from data_pipeline import video
from data_pipeline.world import films
from data_pipeline.world.questions import multiple_choice

LAYOUT = {
    "mvbench": ("json", "video", None), "mlvu": ("json", "video", None), "lvbench": ("json", "frames", None),
    "perceptiontest": ("", "videos", None), "longvideobench": ("", "videos", "subtitles"),
    "videomme": ("videomme", "data", "subtitle"), "videomme_w_subtitle": ("videomme", "data", "subtitle"),
    "charades_sta": ("", "videos", None),
}  # fmt: skip


def make(folder: pathlib.Path, number: int = 2, seconds: int = 8, seed: int = 0) -> dict[str, dict[str, str]]:
    """Write everything; returns the options of `hico eval` for each benchmark."""
    asked = []
    for i in range(number):
        placed = films.needles(seed + i, seconds, split="val")
        path = folder / "films" / f"film{i}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        film = films.haystack(path, num_seconds=seconds, seed=seed + i, needles=placed, split="val")
        for question in film.questions:
            if question.kind in ("card_colour", "card_shape"):
                choice = multiple_choice(question, np.random.default_rng((seed, i)))
                asked.append((i, film, question.text, list(choice.options), question.answer))
    for name in LAYOUT:
        globals()[f"_{name}"](folder / name, asked)
        _link(folder / name / LAYOUT[name][1], folder / "films", frames=name == "lvbench")
    return {name: _options(folder / name, *LAYOUT[name]) for name in LAYOUT}


def _options(root: pathlib.Path, annotations: str, videos: str, subtitles: str | None) -> dict[str, str]:
    found = {"annotations": str(root / annotations), "videos": str(root / videos)}
    return found | ({"subtitles": str(root / subtitles)} if subtitles else {})


def _link(target: pathlib.Path, source: pathlib.Path, *, frames: bool) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.mp4")):
        if not frames:
            os.link(path, target / path.name)
            continue
        place = target / f"{int(path.stem.removeprefix('film')):08d}"
        place.mkdir()
        found = video.read_frames(path, sampling=video.DEFAULT).frames
        from PIL import Image

        for i, frame in enumerate(found):
            Image.fromarray(frame).save(place / f"frame_{i}.jpg", quality=95)


def _dump(path: pathlib.Path, records: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(records), path)
    else:
        path.write_text(json.dumps(records, indent=1))


def _mvbench(root: pathlib.Path, asked: list[Any]) -> None:
    for task, part in (("action_count", {}), ("action_sequence", {"start": 0.0, "end": 6.0})):
        _dump(root / "json" / f"{task}.json", [
            {"video": f"film{i}.mp4", "question": q, "candidates": o, "answer": a, **part}
            for i, _, q, o, a in asked
        ])  # fmt: skip


def _mlvu(root: pathlib.Path, asked: list[Any]) -> None:
    for place, task in enumerate(("1_plotQA", "4_count")):
        _dump(root / "json" / f"{task}.json", [
            {"video": f"film{i}.mp4", "duration": f.scene.duration_s, "question": q, "candidates": o, "answer": a,
             "question_type": task.split("_")[1]}
            for i, f, q, o, a in asked[place:]
        ])  # fmt: skip


def _lvbench(root: pathlib.Path, asked: list[Any]) -> None:
    for kind in ("cartoon", "tv"):
        _dump(root / "json" / f"lvbench_clean_{kind}.json", [
            {"video": f"{i:08d}", "type": kind, "question": q, "candidates": _lettered(o, "({}) {}"),
             "answer": f"({'ABCD'[o.index(a)]}) {a}", "question_type": ["entity recognition"],
             "time_reference": "00:00-00:04"}
            for i, _, q, o, a in asked
        ])  # fmt: skip


def _perceptiontest(root: pathlib.Path, asked: list[Any]) -> None:
    _dump(root / "mc_question_val.parquet", [
        {"video_name": f"film{i}", "question": q, "question_id": str(n), "options": _three(o, a),
         "answer_id": str(_three(o, a).index(a)), "area": "semantics", "reasoning": "descriptive", "tag": []}
        for n, (i, _, q, o, a) in enumerate(asked)
    ])  # fmt: skip


def _lettered(options: list[str], form: str) -> list[str]:
    return [form.format("ABCD"[i], option) for i, option in enumerate(options)]


def _three(options: list[str], answer: str) -> list[str]:
    return ([o for o in options if o != answer] + [answer])[-3:]


def _longvideobench(root: pathlib.Path, asked: list[Any]) -> None:
    for i, *_ in asked:
        lines = [{"start": "00:00:00.500", "end": "00:00:03.500", "line": f"This is film {i}."},
                 {"start": "00:10:00.000", "end": "00:10:01.000", "line": "Nobody hears this."}]  # fmt: skip
        _dump(root / "subtitles" / f"film{i}_en.json", lines)
    _dump(root / "lvb_val.json", [
        {"video_id": f"film{i}", "id": f"film{i}_{n}", "video_path": f"film{i}.mp4",
         "subtitle_path": f"film{i}_en.json", "correct_choice": o.index(a), "question": q,
         **{f"option{k}": o[k] if k < len(o) else "N/A" for k in range(5)}, "duration": f.scene.duration_s,
         "duration_group": 15 if n % 2 else 60, "question_category": "S2E", "topic_category": "KA",
         "starting_timestamp_for_subtitles": 0.0}
        for n, (i, f, q, o, a) in enumerate(asked)
    ])  # fmt: skip


def _videomme(root: pathlib.Path, asked: list[Any]) -> None:
    (root / "subtitle").mkdir(parents=True)
    for i in {i for i, *_ in asked if i % 2 == 0}:  # some have none, as there
        text = f'1\n00:00:00,100 --> 00:00:01,000\n<font color="white" size=".72c">This is film {i}.</font>\n\n'
        (root / "subtitle" / f"film{i}.srt").write_text(text)
    _dump(root / "videomme" / "test-00000-of-00001.parquet", [
        {"video_id": f"{i:03d}", "duration": ("short", "medium", "long")[n % 3], "domain": "Knowledge",
         "sub_category": "Shapes", "url": "", "videoID": f"film{i}", "question_id": f"{i:03d}-{n}",
         "task_type": "Object Recognition", "question": q, "options": _lettered(o, "{}. {}"),
         "answer": "ABCD"[o.index(a)]}
        for n, (i, _, q, o, a) in enumerate(asked)
    ])  # fmt: skip


_videomme_w_subtitle = _videomme


def _charades_sta(root: pathlib.Path, asked: list[Any]) -> None:
    first = {i: film for i, film, *_ in reversed(asked)}
    _dump(root / "charades_sta_test.json", [
        {"video": f"film{i}.mp4", "caption": f"a {film.scene.cards[0].colour} card is shown.",
         "timestamp": [film.scene.cards[0].start_s, film.scene.cards[0].end_s]}
        for i, film in sorted(first.items())
    ])  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--films", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(make(args.folder, args.films, args.seconds, args.seed), indent=1))
