"""`hico ask`: questions about a video, answered by released, exported or freshly trained weights.

In: the command's options. Out: answers on the terminal, with what each step took, or one JSON object.
Next: hico_jax/film.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time

import jax
from flax import nnx
from jax.sharding import Mesh

from data_pipeline.frames import Sampling
from data_pipeline.tokenizer import load_tokenizer
from hico_jax import checkpoint, config, film, lora, quantize, weights
from hico_jax.batch import DropSchedule
from hico_jax.convert import load
from hico_jax.generate import GenerationConfig
from hico_jax.models.hico import HiCo, HiCoConfig

DEFAULT_MODEL = "runs/demo/model"


def main(args: argparse.Namespace) -> int:
    """Answer every question about one video.

    Raises:
      ValueError: no weights, an unreadable video, or settings that do not fit the model.
    """
    began = time.perf_counter()
    folder = args.model or DEFAULT_MODEL
    if args.model is None and not pathlib.Path(folder).is_dir():
        raise ValueError(
            f"no model was named and there is none in {folder}; give one with --model (`--model nano` ships), "
            f"or make one with `hico demo --train`"
        )
    if not os.path.exists(args.video):
        raise ValueError(f"{args.video}: there is no such file")
    model, tokenizer_folder = load_model(folder, args.dtype)
    if args.drop is not None:
        model = with_drop(model, DropSchedule(*args.drop))
    if args.quantize:
        model = quantize.quantized(model, args.quantize)
    tokenizer = load_tokenizer(tokenizer_folder)
    sampling = film.INFERENCE
    if args.max_frames is not None:
        sampling = dataclasses.replace(sampling, max_frames=args.max_frames, min_frames=min(64, args.max_frames))
    viewer = film.Viewer(model, tokenizer, sampling=whole_clips(sampling, model))
    load_s = time.perf_counter() - began
    note = "" if args.json else f"watching {args.video} (the first time compiles) ..."
    if note:
        print(note, file=sys.stderr, flush=True)
    seen = viewer.watch(args.video, start=args.start, end=args.end, reader=args.reader)
    settings = GenerationConfig(
        max_new_tokens=args.max_new_tokens, do_sample=args.temperature > 0, temperature=args.temperature or 1.0,
        top_k=args.top_k, top_p=args.top_p, repetition_penalty=args.repetition_penalty, eos=tokenizer.eos_ids,
        seed=args.seed,
    )  # fmt: skip
    answers = [viewer.ask(seen, question, config=settings) for question in args.questions]
    if args.json:
        out = {
            "video": args.video, "model": folder, "load_s": round(load_s, 3),
            "answers": [
                {"question": question, "answer": answer.text, **film.timings(seen, answer)}
                for question, answer in zip(args.questions, answers, strict=True)
            ],
        }  # fmt: skip
        print(json.dumps(out, indent=2, ensure_ascii=False))
        return 0
    for question, answer in zip(args.questions, answers, strict=True):
        print(f"Q: {question}\nA: {answer.text}")
    took = film.timings(seen, answers[-1])
    kept = f" -> {' -> '.join(map(str, took['kept']))} kept" if took["kept"] else ""
    print(
        f"{took['frames']} frames of {took['film_s']:g} s; {took['visual_tokens']} visual tokens{kept}; "
        f"load {load_s:.1f} s, read {took['read_s']:.1f} s, encode {took['encode_s']:.1f} s, "
        f"answer {took['answer_s']:.1f} s",
        file=sys.stderr,
    )
    return 0


def load_model(
    folder: str | os.PathLike[str], dtype: str | None = None, *, mesh: Mesh | None = None
) -> tuple[HiCo, pathlib.Path]:
    """A model and where its tokenizer is: from released, exported or converted weights, or from the workdir of a run.

    Args:
      dtype: of parameters and activations; None: as the folder says, but float32 on a CPU (`usual_dtype`).
      mesh: where to put released parameters; None is the default device.

    The name of a shipped model (`weights.find`) stands for its folder.

    Raises:
      ValueError: the folder is neither, or its weights do not fit.
    """
    folder = weights.find(folder)
    path = folder / load.CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {load.CONFIG}; give a folder of released weights, or the workdir of a run, "
            f"{weights.known()}"
        )
    if load.holds_weights(load.read_config(folder)):
        dtype = dtype or usual_dtype(sum(one.stat().st_size for one in folder.iterdir()))
        return load.load(folder, dtype=dtype, activations=dtype, mesh=mesh).model, folder
    experiment = config.from_json(path.read_text())
    graph, state = nnx.split(nnx.eval_shape(lambda: experiment.model.build(rngs=nnx.Rngs(params=0))))
    found = lora.load_merged(str(folder), checkpoint.to_dict(state))
    model = nnx.merge(graph, checkpoint.from_dict(found.params, state))
    dtype = dtype or usual_dtype(sum(p.nbytes for p in jax.tree.leaves(model)))
    if dtype is not None:
        model = jax.tree.map(lambda p: p.astype(dtype), model)
        model = with_config(model, dataclasses.replace(model.config, dtype=dtype))
    return model, pathlib.Path(experiment.data.tokenizer)


def usual_dtype(num_bytes: int) -> str | None:
    """In which type a model of so many bytes runs where none is named; None: in its own.

    CPUs widen bfloat16 before every product, which takes longer and is less exact than float32 throughout. A model that
    would take more than half of the memory as float32 stays what it is.
    """
    if jax.default_backend() != "cpu":
        return None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "float32" if 2 * num_bytes <= memory / 2 else None


def with_drop(model: HiCo, schedule: DropSchedule) -> HiCo:
    """The same weights under another schedule of video-level compression."""
    return with_config(model, dataclasses.replace(model.config, drop=schedule))


def with_config(model: HiCo, settings: HiCoConfig) -> HiCo:
    """The same weights under another configuration, of the same sizes."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: settings.build(rngs=nnx.Rngs(params=0))))
    return nnx.merge(graph, nnx.state(model))


def whole_clips(sampling: Sampling, model: HiCo) -> Sampling:
    """The sampling with limits rounded down to whole clips of the model.

    Raises:
      ValueError: fewer frames than one clip.
    """
    frames = model.config.vision.frames_per_clip
    most = sampling.max_frames // frames * frames
    if sampling.max_frames and not most:
        raise ValueError(f"--max-frames {sampling.max_frames} is less than one clip of {frames} frames")
    least = min(sampling.min_frames, most) if most else sampling.min_frames
    return dataclasses.replace(sampling, max_frames=most, min_frames=least // frames * frames)
