"""Every benchmark as data: what it reads, how it asks, how it is judged, what it is broken down by.

In: where annotations, videos and subtitles are. Out: `Item`s, and a `Verdict` for each answer.
Next: hico_jax/evals/bench/runner.py
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hico_jax.evals.bench import annotations, grounding, matchers, prompts
from hico_jax.evals.bench.annotations import Fault


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where a benchmark's files are."""

    annotations: pathlib.Path
    videos: pathlib.Path
    subtitles: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Item:
    """One question about one video. With a `fault` it is not asked, and counts as wrong."""

    id: str
    source: str  # file and place in it
    groups: Mapping[str, str]  # what its score is broken down by; "task" is the benchmark's own split
    video: str = ""
    prompt: str = ""
    options: tuple[str, ...] = ()
    expected: str = ""  # a letter; "" where the given answer is no option
    span: tuple[float, float] | None = None  # of a grounding question
    start: float | None = None  # part of the video that is shown
    end: float | None = None
    reader: str | None = None
    key: str = ""  # what the reference takes for the same question
    fault: str = ""
    note: str = ""  # asked all the same, but the report says so


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was understood and what it is worth: 0 or 1, or an overlap between them."""

    parsed: Any
    score: float
    note: str = ""


Judge = Callable[[Item, str], Verdict]
Make = Callable[[Mapping[str, Any], str, Sources], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark of the paper."""

    name: str
    title: str
    files: tuple[str, ...]  # stems of its annotation files; a * matches anything
    make: Make  # fields of an Item from a record
    reference: Judge
    quirks: str  # key of matchers.QUIRKS
    max_new_tokens: int
    max_frames: int = 512  # of the reference's scripts
    span: bool = False  # answers are spans of time
    drops_empty: bool = False  # the reference leaves empty answers out of its denominator
    needs_subtitles: bool = False
    own: Judge | None = None  # instead of the strict rule, where answers are neither letters nor spans


def read(benchmark: Benchmark, sources: Sources, limit: int | None = None) -> list[Item]:
    """All questions, in file order. A repeated id gets a number; `limit` takes the first so many of each file.

    Raises:
      ValueError: a file or folder is missing, or no record can be asked.
    """
    if not sources.videos.is_dir():
        raise ValueError(f"{sources.videos}: there is no such folder of videos; give it with --videos")
    if benchmark.needs_subtitles and (sources.subtitles is None or not sources.subtitles.is_dir()):
        raise ValueError(f"{benchmark.name} reads subtitles; {sources.subtitles}: no such folder (--subtitles)")
    items: list[Item] = []
    seen: dict[str, int] = {}
    for path in annotations.locate(sources.annotations, benchmark.files):
        for place, record in enumerate(annotations.load(path)[:limit]):
            item = _item(benchmark, record, path, place, sources)
            seen[item.id] = seen.get(item.id, 0) + 1
            if seen[item.id] > 1:
                note = f"the id {item.id!r} is used before; this one is called {item.id}#{seen[item.id]}"
                item = dataclasses.replace(item, id=f"{item.id}#{seen[item.id]}", note=note)
            items.append(item)
    if all(item.fault for item in items):
        raise ValueError(f"{items[0].source}: {items[0].fault} (and none of the {len(items)} records can be asked)")
    return items


def _item(benchmark: Benchmark, record: Any, path: pathlib.Path, place: int, sources: Sources) -> Item:
    task, source, default = path.stem, f"{path}[{place}]", f"{path.stem}/{place}"
    try:
        if not isinstance(record, Mapping):
            raise Fault(f"it is a {type(record).__name__}, not a record")
        made: dict[str, Any] = {"id": default} | benchmark.make(record, task, sources)
    except Fault as fault:
        name = record.get("question_id", record.get("id", default)) if isinstance(record, Mapping) else default
        return Item(id=str(name), source=source, groups={"task": task}, fault=f"{source}: {fault}")
    if not benchmark.span and not made["expected"]:
        made["note"] = f"{source}: its answer is not among the options"
    return Item(source=source, **made)


def strict(item: Item, answer: str) -> Verdict:
    """The strict rule, the same for every benchmark."""
    if item.span is not None:
        found = grounding.strict_span(answer)
        return Verdict(found, 0.0 if found is None else grounding.iou(found, item.span))
    letter = matchers.strict_letter(answer, item.options)
    return Verdict(letter, float(letter is not None and letter == item.expected))


def _by(letter_of: Callable[[str], str | None]) -> Judge:
    def judge(item: Item, answer: str) -> Verdict:
        letter = letter_of(answer)
        return Verdict(letter, float(letter is not None and letter == item.expected))

    return judge


def _longvideobench_judge(item: Item, answer: str) -> Verdict:
    letter, note = matchers.longvideobench_letter(answer, item.options), ""
    if letter is None:
        letter, note = matchers.guess(item.id, len(item.options), seed=0), "guessed"
    return Verdict(letter, float(letter == item.expected), note)


def _charades_judge(item: Item, answer: str) -> Verdict:
    assert item.span is not None
    try:
        found = grounding.reference_span(answer)
        # The reference puts a span that cannot overlap where there is none.
        return Verdict(found, 0.0 if found is None else grounding.hull_iou(item.span, found))
    except (ValueError, ZeroDivisionError) as error:
        return Verdict(None, 0.0, f"the reference stops here: {error}")


def _video(sources: Sources, name: str, *folders: str) -> str:
    """The first place where the video is; the first place looked at where it is nowhere."""
    stem = pathlib.PurePath(name)
    if stem.is_absolute() or ".." in stem.parts:
        raise Fault(f"its video {name!r} points outside the folder of videos")
    places = [sources.videos / folder / name for folder in (*folders, "")]
    suffixes = ("",) if stem.suffix else ("", ".mp4", ".mkv", ".webm", ".avi")
    tried = [p.with_name(p.name + s) for p in places for s in suffixes]
    return str(next((p for p in tried if p.exists()), tried[0]))


def _choice(options: Sequence[str], answer: str) -> str:
    """The letter of the option that equals the answer."""
    return matchers.LETTERS[list(options).index(answer)] if answer in options else ""


def _letter(options: Sequence[str], index: float) -> str:
    """The letter of an index."""
    return matchers.LETTERS[int(index)] if index == int(index) and 0 <= index < len(options) else ""


# Folders of MVBench's published layout; videos are also found in a folder named like the task, or in no folder.
MVBENCH = {
    "action_sequence": "star/Charades_v1_480", "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video", "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test", "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480", "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation", "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video", "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation", "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos", "fine_grained_pose": "nturgbd", "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}  # fmt: skip
MLVU = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")


def _mvbench(record: Mapping[str, Any], task: str, sources: Sources) -> dict[str, Any]:
    options = annotations.texts(record, "candidates")
    annotations.text(record, "question")
    part: dict[str, Any] = {}
    if "start" in record or "end" in record:
        part = {"start": annotations.number(record, "start"), "end": annotations.number(record, "end")}
    folders = (MVBENCH.get(task, task), f"video/{MVBENCH.get(task, task)}", task)
    return {
        "groups": {"task": task}, "prompt": prompts.mvbench(record), "options": options,
        "expected": _choice(options, annotations.text(record, "answer")),
        "video": _video(sources, annotations.text(record, "video"), *folders),
        "reader": "img" if task == "episodic_reasoning" else None, **part,
    }  # fmt: skip


def _mlvu(record: Mapping[str, Any], task: str, sources: Sources) -> dict[str, Any]:
    options = annotations.texts(record, "candidates")
    annotations.text(record, "question")
    return {
        "groups": {"task": task}, "prompt": prompts.mlvu(record), "options": options,
        "expected": _choice(options, annotations.text(record, "answer")),
        "video": _video(sources, annotations.text(record, "video"), task, f"video/{task}"),
    }  # fmt: skip


def _lvbench(record: Mapping[str, Any], task: str, sources: Sources) -> dict[str, Any]:
    options = annotations.texts(record, "candidates")
    annotations.text(record, "question")
    kinds = record.get("question_type", ())
    groups = {"task": task.removeprefix("lvbench_clean_"), "question_type": ", ".join(kinds) or "none"}
    return {
        "groups": groups, "prompt": prompts.lvbench(record), "options": options,
        "expected": _choice(options, annotations.text(record, "answer")),
        "video": _video(sources, annotations.text(record, "video"), "frames", "video"),
    }  # fmt: skip


def _perceptiontest(record: Mapping[str, Any], task: str, sources: Sources) -> dict[str, Any]:
    options = annotations.texts(record, "options")
    video = annotations.text(record, "video_name")
    annotations.text(record, "question")
    return {
        "id": f"{video}/{annotations.text(record, 'question_id')}", "prompt": prompts.perceptiontest(record),
        "groups": {"task": task, **{k: str(record[k]) for k in ("area", "reasoning") if record.get(k)}},
        "options": options, "expected": _letter(options, annotations.number(record, "answer_id")),
        "video": _video(sources, video, "videos"),
    }  # fmt: skip


def _longvideobench(record: Mapping[str, Any], task: str, sources: Sources) -> dict[str, Any]:
    options = tuple(
        annotations.text(record, f"option{i}")
        for i in range(5)
        if record.get(f"option{i}", "N/A" if i > 1 else None) != "N/A"
    )
    annotations.text(record, "question")
    for name in ("duration", "starting_timestamp_for_subtitles"):
        annotations.number(record, name)
    groups = {k: str(record.get(k, "none")) for k in ("duration_group", "question_category")}
    return {
        "id": annotations.text(record, "id"), "groups": {"task": task, **groups}, "options": options,
        "prompt": prompts.longvideobench(record, _subtitles(sources, annotations.text(record, "subtitle_path"))),
        "expected": _letter(options, annotations.number(record, "correct_choice")),
        "video": _video(sources, annotations.text(record, "video_path"), "videos"),
    }  # fmt: skip


def _subtitles(sources: Sources, name: str) -> list[Any]:
    assert sources.subtitles is not None
    tried = [sources.subtitles / n for n in (name, name.replace(".json", "_en.json"))]
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        raise Fault(f"its subtitles {tried[0]} are not there")
    return _subtitle_file(path)


@functools.lru_cache(maxsize=64)
def _subtitle_file(path: pathlib.Path) -> list[Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Fault(f"its subtitles {path} are not readable ({error})") from error


def _videomme(record: Mapping[str, Any], task: str, sources: Sources, *, subtitles: bool = False) -> dict[str, Any]:
    options = annotations.texts(record, "options")
    annotations.text(record, "question")
    name = annotations.text(record, "videoID")
    groups = {k: str(record.get(k, "none")) for k in ("duration", "domain", "sub_category", "task_type")}
    text = prompts.videomme(record)
    if subtitles:
        assert sources.subtitles is not None
        path = sources.subtitles / f"{name}.srt"
        text = prompts.videomme_subtitles(record, path.read_text("utf-8", "replace") if path.is_file() else None)
    given = annotations.text(record, "answer").strip().upper()
    return {
        "id": annotations.text(record, "question_id"), "groups": {"task": task, **groups}, "options": options,
        "prompt": text, "expected": given if given and given in matchers.LETTERS[: len(options)] else "",
        "video": _video(sources, name, "data", "videos"),
    }  # fmt: skip


def _charades(record: Mapping[str, Any], task: str, sources: Sources) -> dict[str, Any]:
    video, caption = annotations.text(record, "video"), annotations.text(record, "caption")
    span = annotations.span(record, "timestamp")
    return {
        "groups": {"task": task}, "prompt": prompts.charades(record), "span": span,
        "video": _video(sources, video, "Charades_v1_480", "Charades_v1"),
        "key": f"{video}>>>{caption}>>>{list(record['timestamp'])}",
    }  # fmt: skip


_MCQ = _by(matchers.mcq_letter)
_videomme_w = functools.partial(_videomme, subtitles=True)


def _table(found: Iterable[Benchmark]) -> dict[str, Benchmark]:
    return {b.name: b for b in found}


BENCHMARKS = _table([
    Benchmark("mvbench", "MVBench", tuple(MVBENCH), _mvbench, _MCQ, "mcq", 16, drops_empty=True),
    Benchmark("mlvu", "MLVU (multiple choice)", MLVU, _mlvu, _MCQ, "mcq", 16, drops_empty=True),
    Benchmark("lvbench", "LVBench", ("lvbench_clean_*",), _lvbench, _MCQ, "mcq", 16, 640, drops_empty=True),
    Benchmark(
        "perceptiontest", "PerceptionTest (validation, multiple choice)", ("mc_question_val*",), _perceptiontest,
        _by(matchers.perception_letter), "perceptiontest", 1024,
    ),
    Benchmark(
        "longvideobench", "LongVideoBench (validation, with subtitles)", ("lvb_val", "validation*"), _longvideobench,
        _longvideobench_judge, "longvideobench", 32, needs_subtitles=True,
    ),
    Benchmark(
        "videomme", "Video-MME without subtitles", ("test*", "videomme*"), _videomme,
        _by(matchers.videomme_letter), "videomme", 16,
    ),
    Benchmark(
        "videomme_w_subtitle", "Video-MME with subtitles", ("test*", "videomme*"), _videomme_w,
        _by(matchers.videomme_letter), "videomme", 16, needs_subtitles=True,
    ),
    Benchmark(
        "charades_sta", "Charades-STA", ("charades*",), _charades, _charades_judge, "grounding", 50, span=True,
    ),
])  # fmt: skip
