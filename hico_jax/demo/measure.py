"""What the demo measures on the trained model. Every function returns plain JSON values, computed in this run.

In: the demo's folder and plan. Out: results for `story.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from data_pipeline import video
from data_pipeline.frames import Sampling
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.world import films, make, sheet
from hico_jax import ask
from hico_jax.batch import DropSchedule
from hico_jax.convert import export, load
from hico_jax.demo.plan import Plan
from hico_jax.evals import needle
from hico_jax.film import Film, Viewer
from hico_jax.models.hico import HiCo
from hico_jax.report import progress

# Any length: one frame a second of our one-frame-a-second films is every frame. Eight is the inference multiple.
WHOLE = Sampling("dynamic_fps1", 64, 0, 8)
SEEDS = {
    "ask": 1,
    "needle": 10_000,
    "compression": 20_000,
    "merge": 30_000,
    "controls": 40_000,
    "export": 50_000,
    "unseen": 60_000,
    "stages": 70_000,
}
SWITCH = DropSchedule("attention", (2,), (1.0, 0.25))  # what the strip along the film shows


def make_world(out: pathlib.Path, plan: Plan, seed: int) -> dict[str, Any]:
    """The videos and annotations everything else reads."""
    with progress.bar("videos") as tick:
        world = make.make_world(out / "world", preset=plan.preset, seed=seed, progress=tick)
    return {"media": world["media"], "items": world["items"], "held_out": world["held_out"]}


@functools.lru_cache(maxsize=1)
def _viewer(out: pathlib.Path, last: str) -> Viewer:
    model, tokenizer = ask.load_model(out / last)
    return Viewer(model, load_tokenizer(tokenizer), sampling=WHOLE)


def viewer(out: pathlib.Path, plan: Plan) -> Viewer:
    """The model that answers, ready to watch."""
    return _viewer(out, plan.asked)


def with_model(v: Viewer, model: HiCo) -> Viewer:
    """The same viewer around another model."""
    return Viewer(model, v.tokenizer, sampling=v.sampling, clips_per_step=v.clips_per_step)


def ask_film(out: pathlib.Path, plan: Plan, seed: int) -> dict[str, Any]:
    """One long film, kept beside the report so that a user can ask it too."""
    v = viewer(out, plan)
    hidden = needle.hide(out / "film", plan.film_s, 0.62, seed + SEEDS["ask"])
    path = out / "film.mp4"
    pathlib.Path(hidden.film.path).replace(path)
    (out / "film").rmdir()
    began = time.monotonic()
    film = v.watch(path)
    trials = list(needle.ask(v, hidden, film))
    first_s = time.monotonic() - began
    began = time.monotonic()
    list(needle.ask(v, hidden, film))
    again_s = time.monotonic() - began
    card = hidden.film.scene.cards[0]
    _contact_sheet(out / "film.png", path, int(card.start_s), plan.film_s)
    return {
        "trials": records(trials), "card": f"{card.colour} {card.content}", "card_s": [card.start_s, card.end_s],
        "film_s": film.duration_s, "frames": film.num_frames, "first_s": first_s, "again_s": again_s,
        "read_s": film.read_s, "encode_s": film.encode_s, "kept": kept_along(v, film, hidden, SWITCH),
        "patches": film.num_clips * v.model.config.vision.frames_per_clip * v.model.config.vision.patches_per_frame,
    }  # fmt: skip


def _contact_sheet(target: pathlib.Path, path: pathlib.Path, card_s: int, film_s: int) -> None:
    """Frames from all along the film, and the card's own."""
    spread = np.linspace(0, film_s - 1, 12).astype(int).tolist()
    shown = sorted({*spread, card_s + 1, card_s + 2})
    frames = np.concatenate(list(video.iter_frames(path, shown)))
    captions = [f"{second} s" for second in shown]
    sheet.contact_sheet(frames, captions, columns=7, marked=[shown.index(card_s + 1), shown.index(card_s + 2)]).save(
        target
    )


def kept_along(v: Viewer, film: Film, hidden: needle.Hidden, schedule: DropSchedule) -> dict[str, Any]:
    """Share of each clip's tokens alive after the drop, for a question about the card, and what chance would keep."""
    switched = with_model(v, ask.with_drop(v.model, schedule))
    row = switched.row(film, hidden.film.questions[0].text)
    batch, visual = switched.prompt([row], [film])
    stages = _trace(switched.model, batch, visual)
    slots = np.asarray(stages[-1].stream.slots[0])
    alive = np.bincount(slots[slots >= 0] // v.geometry.tokens_per_clip, minlength=film.num_clips)
    return {
        "question": hidden.film.questions[0].text, "schedule": spelled(schedule),
        "share": (alive / v.geometry.tokens_per_clip).tolist(), "kept": int(alive.sum()),
        "of": int((row.slots >= 0).sum()),
    }  # fmt: skip


@jax.jit
def _trace(model: HiCo, batch: Any, visual: Any) -> Any:
    stream = model.splice(batch, visual).replace(targets=None, weights=None)
    return model.llm.trace(stream, batch.drop, schedule=model.config.drop)


def needle_grid(out: pathlib.Path, plan: Plan, seed: int) -> dict[str, Any]:
    """The heat-map: films of every length, a card at every depth, two questions each."""
    v = viewer(out, plan)
    total = len(plan.lengths) * len(plan.depths) * plan.repeats
    with progress.bar("films") as tick:
        trials = needle.haystack(
            v, out / "films", lengths=plan.lengths, depths=plan.depths, repeats=plan.repeats,
            seed=seed + SEEDS["needle"], done=lambda so_far: tick(len(so_far) // 2, total),
        )  # fmt: skip
    folder, first = out / "films", seed + SEEDS["unseen"]
    unseen: list[needle.Trial] = []
    for i, depth in enumerate(np.random.default_rng(first).uniform(size=plan.unseen_films)):
        hidden = needle.hide(folder, plan.control_s, float(depth), first + i, split="test")
        unseen += needle.ask(v, hidden, v.watch(hidden.film.path))
        pathlib.Path(hidden.film.path).unlink()
    folder.rmdir()
    return {
        "stages": stages(out, plan, seed),
        "unseen": {"by_kind": by_kind(unseen), "total": summary(unseen), "seconds": plan.control_s},
        "lengths": list(plan.lengths), "depths": list(plan.depths),
        "grid": needle.grid(trials, plan.lengths, plan.depths),
        "by_kind": by_kind(trials), "total": summary(trials), "trials": records(trials),
    }  # fmt: skip


def stages(out: pathlib.Path, plan: Plan, seed: int) -> dict[str, Any]:
    """The model that answers beside that of the last stage, on the same films."""
    v = viewer(out, plan)
    model, _ = ask.load_model(out / plan.stages[-1].name)
    models = {plan.asked: v, plan.stages[-1].name: with_model(v, model)}
    watched = prepare(v, out / "films", plan.control_s, plan.stage_films, seed + SEEDS["stages"])
    found = {}
    for name, each in models.items():
        trials = [t for hidden, _, path in watched for t in needle.ask(each, hidden, each.watch(path))]
        found[name] = {
            "px": each.geometry.image_px, "by_kind": by_kind(trials), "total": summary(trials)
        }  # fmt: skip
    for _, _, path in watched:
        path.unlink()
    (out / "films").rmdir()
    return found | {"seconds": plan.control_s}


def compression(out: pathlib.Path, plan: Plan, seed: int) -> dict[str, Any]:
    """Tokens, seconds and accuracy with both halves of the compression on and off, on the same films."""
    v = viewer(out, plan)
    films_ = prepare(v, out / "films", plan.compare_s, plan.compare_films, seed + SEEDS["compression"])
    schedules = (DropSchedule(), *(DropSchedule(kind, (2,), (1.0, share)) for kind, share in plan.drops))
    video_level = [
        measured(with_model(v, ask.with_drop(v.model, s)), films_, name=spelled(s), kept=s.ratios[-1])
        for s in schedules
    ]
    clips = prepare(v, out / "films", plan.merge_s, plan.merge_films, seed + SEEDS["merge"])
    whole = with_model(v, without_merging(v.model))
    unmerged = [(hidden, whole.watch(path)) for hidden, _, path in clips]
    clip_level = [
        measured(v, [(h, f) for h, f, _ in clips], name="merged", kept=None),
        measured(whole, unmerged, name="every patch", kept=None),
    ]
    for _, _, path in [*films_, *clips]:
        path.unlink(missing_ok=True)
    return {"video_level": video_level, "clip_level": clip_level, "seconds": [plan.compare_s, plan.merge_s]}


Watched = tuple[Any, ...]  # hidden, film, and sometimes its path


def prepare(v: Viewer, folder: pathlib.Path, seconds: int, count: int, seed: int) -> list[Watched]:
    """Films with a card anywhere, watched once."""
    depths = np.random.default_rng(seed).uniform(size=count)
    out = []
    for i, depth in enumerate(depths):
        hidden = needle.hide(folder, seconds, float(depth), seed + i)
        path = pathlib.Path(hidden.film.path)
        out.append((hidden, v.watch(path), path))
    return out


def measured(v: Viewer, watched: Iterable[Watched], *, name: str, kept: float | None) -> dict[str, Any]:
    """Accuracy and the median time of a question. The first film is asked twice, so that compiling is not timed."""
    trials: list[needle.Trial] = []
    for i, (hidden, film, *_) in enumerate(watched):
        if i == 0:
            list(needle.ask(v, hidden, film))
        trials += needle.ask(v, hidden, film)
    return {
        "name": name, "kept": kept, "visual_tokens": trials[0].visual_tokens,
        "seconds": statistics.median(t.answer_s for t in trials), "by_kind": by_kind(trials), "total": summary(trials),
    }  # fmt: skip


def without_merging(model: HiCo) -> HiCo:
    """The same weights with every patch handed to the language model."""
    compressor = dataclasses.replace(
        model.config.compressor, tokens_per_frame=model.config.vision.patches_per_frame
    )  # fmt: skip
    settings = dataclasses.replace(model.config, compressor=compressor)
    graph, _ = nnx.split(nnx.eval_shape(lambda: settings.build(rngs=nnx.Rngs(params=0))))
    return nnx.merge(graph, nnx.state(model))


def controls(out: pathlib.Path, plan: Plan, seed: int) -> dict[str, Any]:
    """The same questions with the card left out, with no film at all, and with shuffled frames."""
    v, folder = viewer(out, plan), out / "films"
    first = seed + SEEDS["controls"]
    depths = np.random.default_rng(first).uniform(size=plan.control_films)
    found: dict[str, list[needle.Trial]] = {k: [] for k in ("film", "blank", "no film", "order", "order shuffled")}
    for i, depth in enumerate(depths):
        hidden = needle.hide(folder, plan.control_s, float(depth), first + i)
        blank = needle.hide(folder, plan.control_s, float(depth), first + i, blank=True)
        found["film"] += needle.ask(v, hidden, v.watch(hidden.film.path))
        found["blank"] += needle.ask(v, blank, v.watch(blank.film.path))
        found["no film"] += needle.ask(v, hidden, None)
        two = needle.hide(folder, plan.control_s, 0.0, first + i, cards=2)
        straight = v.watch(two.film.path)
        mixed = v.watch(two.film.path, order=needle.shuffled(straight.num_frames, first + i))
        found["order"] += needle.ask(v, two, straight, kinds=("order",))
        found["order shuffled"] += needle.ask(v, two, mixed, kinds=("order",))
        for film in (hidden, blank, two):
            pathlib.Path(film.film.path).unlink(missing_ok=True)
    folder.rmdir()
    return {name: {"by_kind": by_kind(t), "total": summary(t)} for name, t in found.items()} | {
        "seconds": plan.control_s
    }


def export_and_reload(out: pathlib.Path, plan: Plan, seed: int) -> dict[str, Any]:
    """Safetensors in the reference's layout, read back, and the same questions asked of both."""
    v = viewer(out, plan)
    folder = export.export(
        v.model, out / "model", files=[out / "world" / "tokenizer.json"], overwrite=True, eos=v.tokenizer.eos_ids
    )
    loaded = load.load(folder)
    again = with_model(v, loaded.model)
    equal = jax.tree.map(
        lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), nnx.state(v.model), nnx.state(loaded.model)
    )
    watched = prepare(v, out / "films", plan.merge_s, plan.merge_films, seed + SEEDS["export"])
    pairs = []
    for hidden, film, path in watched:
        before = list(needle.ask(v, hidden, film))
        after = list(needle.ask(again, hidden, again.watch(path)))
        pairs += [(a.answer, b.answer) for a, b in zip(before, after, strict=True)]
        path.unlink()
    (out / "films").rmdir()
    files = sorted(p.name for p in folder.iterdir())
    return {
        "folder": str(folder), "files": files, "bytes": sum((folder / f).stat().st_size for f in files),
        "weights_equal": all(jax.tree.leaves(equal)), "asked": len(pairs), "same": sum(a == b for a, b in pairs),
    }  # fmt: skip


def spelled(schedule: DropSchedule) -> str:
    """A schedule in words."""
    if not schedule.num_stages:
        return "off"
    return f"{schedule.kind}, {schedule.ratios[-1]:.0%} after layer {schedule.layers[-1]}"


def by_kind(trials: Sequence[needle.Trial]) -> dict[str, dict[str, Any]]:
    """`summary` of each kind of question; kinds that differ in a colour only count as one."""
    kinds = {t.kind: t.kind.split("_")[0] if t.kind.startswith("order_") else t.kind for t in trials}
    return {name: summary([t for t in trials if kinds[t.kind] == name]) for name in dict.fromkeys(kinds.values())}


def summary(trials: Sequence[needle.Trial]) -> dict[str, Any]:
    """How many, how many right, the share and its 95 % interval."""
    right = sum(t.correct for t in trials)
    low, high = needle.interval(right, len(trials))
    return {"asked": len(trials), "right": right, "share": needle.share(trials), "low": low, "high": high}


def records(trials: Iterable[needle.Trial]) -> list[dict[str, Any]]:
    """Every trial as JSON."""
    return [dataclasses.asdict(t) | {"correct": t.correct} for t in trials]


def chance(kind: str) -> float:
    """What guessing scores on a kind of question."""
    return 1 / len(films.KINDS[kind if kind in films.KINDS else f"{kind}_red"].answers)
