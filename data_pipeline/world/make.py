"""Write a world to a folder, as a user's own data would look: videos, images, annotation files, stage lists.

    videos/  images/      the media
    *.json  *.jsonl       annotations in the reference's format (conversations of human and gpt turns)
    stage{1,2,3,4}.yaml   which annotations each stage reads; paths are relative to the YAML file
    {told,images,short,middle,long}.yaml  questions about told films, images, short, middle or long films alone
    tokenizer.json        a small byte-level BPE that knows this world's words
    val*.json test*.json  one question an item about scenes training never shows, with its kind and answer
    settings.json         what is being made; written first
    scenes.jsonl          ground truth of every video
    world.json            what was made; written last

In: a folder and a preset. Out: the folder. Workers share the scenes out; every file appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.tokenizer import train_bpe
from data_pipeline.world import draw, texts
from data_pipeline.world.films import write_scene
from data_pipeline.world.presets import PRESETS, Preset
from data_pipeline.world.questions import Question, ask, choose, conversation
from data_pipeline.world.recipes import SPLITS, Look, held_out, in_proportion, make_scene
from data_pipeline.world.scene import COLOURS, SHAPES, Scene

VERSION = 2  # raise when the same settings would give another world
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Media:
    """One video or image to make: its file and its scene."""

    path: str  # relative to the world's folder
    group: str
    split: str
    recipe: str
    scene: Scene
    index: int


def make_world(
    folder: str | os.PathLike[str],
    *,
    preset: str | Preset = "nano",
    seed: int = 0,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Make the world in `folder` and return the contents of its `world.json`.

    Does nothing when the folder already holds this world; goes on where an interrupted call stopped.
    `progress(done, total)` counts videos.

    Raises:
      ValueError: an unknown preset, or the folder holds another world.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    root = pathlib.Path(folder)
    settings = json.loads(json.dumps({"version": VERSION, "seed": seed, "preset": dataclasses.asdict(preset)}))
    begun = root / "settings.json"
    if begun.exists() and json.loads(begun.read_text()) != settings:
        raise ValueError(f"{root} holds another world (see its settings.json); choose another folder or delete it")
    finished = root / "world.json"
    if finished.exists():
        return json.loads(finished.read_text())
    for name in ("videos", "images"):
        (root / name).mkdir(parents=True, exist_ok=True)
    _write(begun, _json(settings))

    media = plan(preset, seed)
    _write_media(root, preset, seed, media, progress, workers)
    for left in root.glob("*/.*.part"):  # of a call that was killed
        left.unlink(missing_ok=True)
    files = annotate(preset, seed, media)
    for name, items in files.items():
        _write(root / name, "".join(_json(i, None) for i in items) if name.endswith("l") else _json(items))
    for name, datasets in _stages(files).items():
        _write(root / name, datasets)
    train_bpe(texts.corpus(preset), preset.vocabulary).save(root)
    _write(root / "scenes.jsonl", "".join(_json({"path": m.path, **m.scene.describe()}, None) for m in media))
    world = {
        **settings,
        "media": {g: sum(m.group == g for m in media) for g in dict.fromkeys(m.group for m in media)},
        "items": {name: len(items) for name, items in files.items()},
        "held_out": [[c, s] for c in COLOURS for s in SHAPES if held_out(c, s)],
    }
    _write(finished, _json(world))
    return world


def plan(preset: Preset, seed: int) -> list[Media]:
    """Every video and image of a world and the scene it shows. Pure: the same arguments, the same plan."""
    looks = {
        "short": Look(preset.px, 2.0, preset.short_s, preset.card_s, preset.contents, preset.written),
        "long": Look(preset.px, 1.0, preset.long_s, preset.card_s, preset.contents, preset.written),
        "image": Look(preset.px, 1.0, (4.0, 4.0), (4.0, 4.0), preset.contents, preset.written),
        "middle": Look(preset.px, 1.0, preset.middle_s, preset.card_s, preset.contents, preset.written),
    }
    recipes = {
        "short": preset.recipes, "long": preset.long_recipes, "image": preset.image_recipes,
        "middle": preset.middle_recipes,
    }  # fmt: skip
    out: list[Media] = []
    index = 0
    for split, groups, middle in zip(SPLITS, (preset.train, preset.val, preset.test), preset.middle, strict=True):
        for group, number in zip(looks, (*groups, middle), strict=True):
            for recipe in in_proportion(recipes[group], number):
                scene = make_scene(recipe, seed=seed, split=split, index=index, look=looks[group])
                kind, ending = ("images", "jpg") if group == "image" else ("videos", "mp4")
                path = f"{kind}/{split}_{group}_{index:05d}.{ending}"
                out.append(Media(path, group, split, recipe, scene, index))
                index += 1
    return out


def annotate(preset: Preset, seed: int, media: Sequence[Media]) -> dict[str, list[dict[str, Any]]]:
    """All annotation files: name -> items."""
    files: dict[str, list[dict[str, Any]]] = {
        name: []
        for name in (
            "stage1_images.json", "stage1_videos.json", "stage2_images.json", "stage2_pairs.json", "stage2_videos.json",
            "stage3_short.json", "stage3_middle.json", "stage3_long.jsonl", "text.jsonl", "told.jsonl",
            "options.jsonl",
            "val.json", "val_long.json", "test.json", "test_long.json",
        )
    }  # fmt: skip
    for m in media:
        rng = np.random.default_rng((m.scene.seed, 2))
        caption = ask("caption", m.scene)
        assert caption is not None
        if m.split != "train":
            if m.group != "image":
                for i, q in enumerate(choose(m.scene, preset.weights, rng, turns=2)):
                    sheet = f"{m.split}{'' if m.group == 'short' else '_long'}.json"
                    files[sheet].append({**_item(m, [q], i), "kind": q.kind, "answer": q.answer})
            continue
        if m.group == "image":
            files["stage1_images.json"].append(_item(m, [caption], 0))
            files["stage2_images.json"].append(_item(m, choose(m.scene, preset.weights, rng, turns=preset.turns), 1))
            continue
        drawn = [
            choose(
                m.scene,
                preset.weights,
                rng,
                turns=preset.turns,
                choice_share=preset.choice_share,
                paper_share=preset.paper_share,
                think_share=preset.think_share,
            )
            for _ in range(preset.conversations)
        ]
        drawn = [questions for questions in drawn if questions]
        if m.group == "short":
            files["stage1_videos.json"].append(_item(m, [caption], 0))
            files["stage2_videos.json"].append(_item(m, [caption, *drawn[0][: preset.turns - 1]], 1))
        target = f"stage3_{m.group}.json{'l' if m.group == 'long' else ''}"
        files[target].extend(_item(m, questions, 2 + i) for i, questions in enumerate(drawn))
    files["stage2_pairs.json"] = _pairs(preset, [m for m in media if m.split == "train" and m.group == "image"])
    files["text.jsonl"] = texts.text_items(np.random.default_rng((seed, 3)), preset.texts)
    files["told.jsonl"] = texts.told_items(preset, seed)
    files["options.jsonl"] = texts.option_items(np.random.default_rng((seed, 6)), preset.options)
    return files


def _item(media: Media, questions: Sequence[Question], number: int) -> dict[str, Any]:
    """One annotation: questions and answers about one video or image."""
    return {
        "id": f"{media.split}_{media.index:05d}_{number}",
        "image" if media.group == "image" else "video": os.path.basename(media.path),
        "conversations": conversation(questions),
    }


def _pairs(preset: Preset, images: Sequence[Media]) -> list[dict[str, Any]]:
    """Questions about two images at once: the first card and the second card."""
    out = []
    for a, b in zip(images[::4], images[1::4], strict=False):
        first, second = a.scene.cards[0], b.scene.cards[0]
        if first.colour == second.colour:
            continue
        later = dataclasses.replace(second, start_s=first.end_s, end_s=first.end_s + 1)
        both = dataclasses.replace(a.scene, cards=(first, later), duration_s=later.end_s)
        rng = np.random.default_rng((a.scene.seed, 4))
        turns = conversation(choose(both, preset.weights, rng, turns=preset.turns), media="<image>\n<image>\n")
        names = [os.path.basename(a.path), os.path.basename(b.path)]
        out.append({"id": f"pair_{a.index:05d}", "image": names, "conversations": turns})
    return out


def _stages(files: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """The four stage lists, in the reference's YAML form."""
    tables = {
        "stage1.yaml": (("stage1_images.json", "all"), ("stage1_videos.json", "all")),
        "stage2.yaml": (
            ("stage2_images.json", "all"), ("stage2_pairs.json", "all"), ("stage2_videos.json", "all"),
            ("text.jsonl", "all"),
        ),
        "stage3.yaml": (
            ("stage3_short.json", "all"), ("stage3_middle.json", "all"), ("stage3_long.jsonl", "all"),
            ("stage2_images.json", "first:50%"), ("text.jsonl", "first:25%"),
        ),
        # Short films only: four to twelve frames a row, what a small model learns from on two cores.
        "short.yaml": (("stage3_short.json", "all"),),
        # One kind each, so that every batch has one shape and a small model meets the easy things first.
        "told.yaml": (("told.jsonl", "all"), ("options.jsonl", "all")),
        "images.yaml": (("stage2_images.json", "all"),),
        "middle.yaml": (("stage3_middle.json", "all"),),
        "long.yaml": (("stage3_long.jsonl", "all"),),
        "stage4.yaml": (("stage3_short.json", "end:50%"), ("stage3_long.jsonl", "all")),
    }  # fmt: skip
    out = {}
    for stage, rows in tables.items():
        text = "datasets:\n"
        for name, strategy in rows:
            if not files[name]:
                continue
            text += f"  - json_path: {name}\n    sampling_strategy: {strategy}\n"
            if "image" in files[name][0] or "video" in files[name][0]:
                text += f"    data_root: {'images' if 'image' in files[name][0] else 'videos'}\n"
        if any(files[name] for name, _ in rows):
            out[stage] = text
    return out


def _write_media(root: pathlib.Path, preset: Preset, seed: int, media: Sequence[Media], progress: Progress | None,
                 workers: int | None) -> None:  # fmt: skip
    """Draw and encode what is missing, in worker processes.

    Each worker gets its share at the start and reports through its own pipe: when this process dies, the pipe breaks
    and the worker ends too.
    """
    missing = [i for i, m in enumerate(media) if not (root / m.path).exists()]
    done = len(media) - len(missing)
    if progress:
        progress(done, len(media))
    if not missing:
        return
    num = max(1, min(workers or os.cpu_count() or 1, len(missing) // 8))
    if num == 1:
        for i in missing:
            _write_one(root, media[i])
            done += 1
            if progress:
                progress(done, len(media))
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of JAX in an unusable state
    running: dict[Connection, Any] = {}
    for k in range(num):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(str(root), preset, seed, missing[k::num], sender))
        process.start()
        sender.close()
        running[receiver] = process
    try:
        while running:
            for receiver in wait(list(running)):
                assert isinstance(receiver, Connection)
                try:
                    receiver.recv()
                except EOFError:
                    process = running.pop(receiver)
                    process.join()
                    if process.exitcode:
                        raise RuntimeError(f"a worker writing to {root} ended with code {process.exitcode}") from None
                    continue
                done += 1
                if progress:
                    progress(done, len(media))
    finally:
        for process in running.values():
            process.terminate()


def _work(root: str, preset: Preset, seed: int, indices: Sequence[int], sender: Connection) -> None:
    media = plan(preset, seed)
    for i in indices:
        _write_one(pathlib.Path(root), media[i])
        sender.send(i)


def _write_one(root: pathlib.Path, media: Media) -> None:
    path = root / media.path
    if media.group != "image":
        write_scene(path, media.scene)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    Image.fromarray(draw.frame(media.scene, 0)).save(part, "JPEG", quality=92, subsampling=0)
    os.replace(part, path)


def _json(data: Any, indent: int | None = 1) -> str:
    return json.dumps(data, indent=indent, ensure_ascii=False) + "\n"


def _write(path: pathlib.Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
