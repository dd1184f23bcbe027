"""The `hico` command: one table of sub-commands, each imported only when it runs.

In: the command line. Out: an exit code (`EXIT_CODES`). Nothing here imports JAX, so help answers at once.
`train` takes `ml_collections` flags and parses them itself; the others get an `argparse.Namespace`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from hico_jax import __version__
from hico_jax.options import (
    DTYPE_HELP,
    bench_options,
    check_eval,
    compare_options,
    compress_options,
    count,
    eval_options,
    fraction,
    niah_options,
    not_negative,
    parse_drop,
    positive,
    quantize_option,
    seconds,
    serve_options,
)

OK, BROKEN, MISUSED, AGAIN, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 75, 130, 141

EXIT_CODES = f"""exit codes:
  {OK:<4} done
  {BROKEN:<4} something is broken (doctor says what; otherwise a traceback)
  {MISUSED:<4} a mistake in the command, a path or a configuration; one line on stderr says which
  {AGAIN:<4} told to stop (SIGTERM, preemption) and saved: run the same command again
  {INTERRUPTED:<4} stopped by Ctrl-C
  {PIPE_CLOSED:<4} whoever read the output closed it (`hico models | head`)

HICO_DEBUG=1 shows the traceback of every error."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A sub-command: what help says, its options, and the `module:function` that does the work."""

    target: str  # called with the namespace, or with the raw arguments when `options` is None
    summary: str
    options: Callable[[argparse.ArgumentParser], None] | None
    epilog: str = ""
    resume: str = "Nothing was kept; run the command again."  # said after Ctrl-C
    check: Callable[[argparse.Namespace], None] | None = None  # what one option alone cannot tell; raises ValueError


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and say how it went as an exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    name = args[0] if args else ""
    if name and not name.startswith("-") and name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"Did you mean `hico {near[0]}`?" if near else "`hico --help` lists them."
        print(f"hico: there is no command {name!r}. {hint}", file=sys.stderr)
        return MISUSED
    try:
        if name in COMMANDS and COMMANDS[name].options is None:
            return _pass_through(name, args[1:])
        parser = make_parser()
        if not args:
            parser.print_help()
            return MISUSED
        parsed = parser.parse_args(args)
    except SystemExit as stop:  # argparse has spoken: --help, --version or a mistake
        return stop.code if isinstance(stop.code, int) else MISUSED
    return _run(parsed.command, parsed)


def make_parser() -> argparse.ArgumentParser:
    """The parser of every sub-command."""
    parser = _Parser(
        prog="hico",
        description="VideoChat-Flash in JAX: train, ask and look inside a long-video language model.",
        epilog=f"Start with `hico demo`: nothing to download, no accelerator.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hico_jax {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if command.options is not None:
            command.options(sub)
    return parser


def _pass_through(name: str, args: list[str]) -> int:
    if args in ([], ["-h"], ["--help"]):
        print(f"usage: hico {name} [FLAGS]\n\n{COMMANDS[name].summary.capitalize()}.\n\n{COMMANDS[name].epilog}")
        return OK if args else MISUSED
    return _run(name, args)


def _run(name: str, arguments: argparse.Namespace | list[str]) -> int:
    command = COMMANDS[name]
    module, function = command.target.split(":")
    try:
        if command.check is not None and isinstance(arguments, argparse.Namespace):
            command.check(arguments)
        code = getattr(importlib.import_module(module), function)(arguments)
        sys.stdout.flush()
        return OK if code is None else int(code)
    except KeyboardInterrupt:
        print(f"\nhico {name}: stopped. {command.resume}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return PIPE_CLOSED
    except (ValueError, OSError) as error:  # what a user's arguments, files and configuration can cause
        if os.environ.get("HICO_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"hico {name}: {message}", file=sys.stderr)
        return MISUSED


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", help="where everything is written (runs/nano; runs/demo when a model is trained)"
    )
    parser.add_argument(
        "--train", action="store_true", help="train a small model from nothing instead: about ten minutes on two cores"
    )
    parser.add_argument("--quick", action="store_true", help="train on less: about two minutes, a lower score")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on from what DIR holds")
    parser.add_argument("--seed", type=count, default=0, help="of the videos and of the weights (%(default)s)")


def _ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="a video or an image file, or a folder of frames")
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="what to ask")
    parser.add_argument(
        "-q", "--question", dest="questions", metavar="QUESTION", action="append", default=[],
        help="the same, or one more about the same video; may be given again",
    )  # fmt: skip
    parser.add_argument("--model", metavar="FOLDER", help="released or trained weights, or nano, which ships")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=DTYPE_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    seen = parser.add_argument_group("what the model sees")
    seen.add_argument(
        "--max-frames", metavar="N", type=positive, help="at most this many frames (the model's own limit)"
    )
    seen.add_argument("--start", metavar="S", type=seconds, help="seconds into the video to begin at")
    seen.add_argument("--end", metavar="S", type=seconds, help="seconds into the video to stop at")
    seen.add_argument("--reader", metavar="KIND", help="how VIDEO is read; chosen from what it is")
    seen.add_argument(
        "--drop", metavar="KIND:LAYERS:RATIOS", type=parse_drop,
        help="video-level compression, for example uniform0_attention:4,18:1,0.5,0.25; `none` switches it off",
    )  # fmt: skip

    said = parser.add_argument_group("how it answers")
    said.add_argument("--max-new-tokens", metavar="N", type=positive, default=512, help="(%(default)s)")
    said.add_argument("--temperature", metavar="T", type=not_negative, default=0.0, help="0 is greedy (%(default)s)")
    said.add_argument("--top-p", metavar="P", type=fraction, default=1.0, help="(%(default)s)")
    said.add_argument("--top-k", metavar="K", type=count, default=0, help="0 keeps all (%(default)s)")
    said.add_argument("--repetition-penalty", metavar="R", type=not_negative, default=1.0, help="(%(default)s)")
    said.add_argument("--seed", type=count, default=0, help="of the sampling (%(default)s)")
    quantize_option(said)


def _check_ask(args: argparse.Namespace) -> None:
    args.questions = [q for q in (args.question, *args.questions) if q]
    if not args.questions:
        raise ValueError('no question was given; for example: hico ask film.mp4 "What happens?"')
    if args.start is not None and args.end is not None and args.end <= args.start:
        raise ValueError(f"--end {args.end:g} is not after --start {args.start:g}")


def _world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", default="world", help="folder of the videos and annotations (%(default)s)"
    )
    parser.add_argument("--preset", metavar="NAME", default="nano", help="how many videos, and which (%(default)s)")
    parser.add_argument("--seed", type=count, default=0, help="same seed, same files (%(default)s)")
    film = parser.add_argument_group("or one long film with something to find in it")
    film.add_argument("--film", metavar="FILE.mp4", help="write this one film instead")
    film.add_argument("--seconds", metavar="S", type=seconds, default=1024.0, help="its length (%(default)s)")
    film.add_argument("--needle-at", metavar="S", type=seconds, help="when the card shows (anywhere, by the seed)")


def _check_world(args: argparse.Namespace) -> None:
    if args.film is None and args.needle_at is not None:
        raise ValueError("--needle-at places a card in one film; name the film with --film FILE.mp4")


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder of released weights, or a file of a part of a model")
    parser.add_argument("target", metavar="DST", help="the folder to write")
    parser.add_argument("--like", metavar="NAME", help="of which model SRC is a part: a name of `hico models`")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read the tensors of .bin and .pt files (code in them never runs)"
    )
    parser.add_argument(
        "--tokens-per-frame", metavar="N", type=positive,
        help="16 or 64: which InternVL HiCo model SRC is, if its name does not say R16 or R64",
    )  # fmt: skip
    _written(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="what `hico convert` wrote, or the workdir of a run")
    parser.add_argument("target", metavar="DST", help="the folder to write")
    parser.add_argument(
        "--part", choices=("all", "llm", "adapter"), default="all",
        help="`llm`: the language model alone, for stock programs; `adapter`: a run's low-rank adapters, for PEFT",
    )  # fmt: skip
    _written(parser)


def _written(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (as they are)")
    parser.add_argument("--overwrite", action="store_true", help="replace what DST holds, once all is written")
    parser.add_argument(
        "--max-shard-bytes", metavar="N", type=positive, default=5_000_000_000, help="size of a file (%(default)s)"
    )


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("check", "prepare"), help="find every defect, or write ArrayRecord")
    parser.add_argument("file", metavar="FILE", help="a YAML of datasets, or one .json or .jsonl")
    parser.add_argument("--data-root", metavar="DIR", default="", help="media are below it")
    checked = parser.add_argument_group("check")
    checked.add_argument("--model", metavar="NAME", default="umt_qwen2_7b", help="whose rows are counted (%(default)s)")
    checked.add_argument("--tokenizer", metavar="DIR", help="counts text exactly instead of guessing")
    checked.add_argument("--sample", default="dynamic_fps1", help="how frames are chosen (%(default)s)")
    checked.add_argument("--min-frames", metavar="N", type=count, default=64, help="(%(default)s)")
    checked.add_argument("--max-frames", metavar="N", type=count, default=512, help="(%(default)s)")
    checked.add_argument("--headers", action="store_true", help="decode nothing: faster, misses damage inside files")
    checked.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    prepared = parser.add_argument_group("prepare")
    prepared.add_argument("--out", metavar="DIR", help="new folder or bucket path")
    prepared.add_argument("--beam", metavar="OPTIONS", help="read media with Apache Beam: '--runner=... --...'")


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


TRAIN_HELP = """The configuration is a file; a colon picks a structure, a dot tunes a value:

  hico train --config configs/debug_tiny.py --config.workdir=runs/tiny
  hico train --config configs/stage3_sft.py:umt_qwen2_7b --config.optim.warmup_steps=500

Each file in configs/ says what to expect and how to run it. The same command again goes on from the last checkpoint.
`hico train --helpfull` lists every flag of the libraries below."""

PLAN_HELP = """Takes the flags of `hico train`, and:

  --topology=CHIP:SHAPE     v5p:4x4x4, 2*v5e:8x8 (two slices), h100:8
  --tokens=N --rows=N       another batch than the configuration's (--config.data.max_tokens is the same as --tokens)
  --clips=N                 clips of a row; by default film fills the row
  --prefill                 answering instead of training
  --compile                 ask the real compiler too (TPU: pip install -e '.[tpu-compile]'; GPU: those present)
  --json                    one JSON object
  --table                   the table of docs/scale.md

  hico plan --config=configs/stage3_sft.py:umt_qwen2_7b --topology=v5p:4x4x4 --tokens=1048576"""

COMMANDS: dict[str, Command] = {
    "demo": Command(
        "hico_jax.demo:main",
        "ask the model that ships about a film; with --train, make one from nothing; no accelerator",
        _demo,
        resume="With --train the same command goes on where it stopped; --fresh starts over.",
    ),
    "ask": Command(
        "hico_jax.ask:main",
        "ask about a video",
        _ask,
        'examples:\n  hico ask film.mp4 "What happens?" --model weights/\n'
        '  hico ask film.mp4 -q "Who is there?" -q "When do they leave?" --start 60 --end 120',
        check=_check_ask,
    ),
    "serve": Command(
        "hico_jax.serve.command:main",
        "answer over HTTP as OpenAI's API does, with a page to ask on",
        serve_options,
        "examples:\n  hico serve --model runs/demo/model\n"
        "  HICO_API_KEY=secret hico serve --model weights/ --host 0.0.0.0 --lanes 8x4096,2x32768",
        resume="Uploads are gone; start it again any time.",
    ),
    "train": Command(
        "hico_jax.train:main",
        "run a training stage from a configuration file",
        None,
        TRAIN_HELP,
        resume="The same command goes on from the last checkpoint.",
    ),
    "eval": Command(
        "hico_jax.evals.bench.command:main",
        "score a model on a benchmark, as the reference does and strictly",
        eval_options,
        "examples:\n  hico eval videomme --model weights/ --annotations videomme/ --videos videomme/data\n"
        "  for i in 0 1 2 3; do hico eval mvbench --model weights/ --annotations MVBench/json --videos MVBench/video "
        "--shard $i/4 & done",
        resume="The same command asks the questions that are left.",
        check=check_eval,
    ),
    "niah": Command(
        "hico_jax.evals.niah.command:main",
        "hide pictures in a long film and ask about them, at every depth and length",
        niah_options,
        "examples:\n  hico niah --model runs/demo/model\n"
        "  hico niah --model weights/ --haystack film.mkv --needles niah-coco-singlehop_20.json --images images/ "
        "--frames 1000,5000,10000\n  hico niah --model runs/demo/model --hops 5",
        resume="The same command tries what is left.",
    ),
    "compress": Command(
        "hico_jax.evals.compress.command:main",
        "compare compressors on the same questions: accuracy, tokens, seconds, memory",
        compress_options,
        "examples:\n  hico compress --model runs/demo/model\n"
        "  hico compress --model weights/ --benchmark mvbench --annotations MVBench/json --videos MVBench/video",
        resume="The same command asks the questions that are left.",
    ),
    "compare": Command(
        "hico_jax.evals.compare:main",
        "say what one evaluation scores more than another on the same questions, with an interval",
        compare_options,
        "examples:\n  hico compare runs/niah_attention runs/niah_uniform\n"
        "  hico compare runs/compress/drop-attention runs/compress/drop-uniform",
        resume="Nothing was changed; run it again any time.",
    ),
    "bench": Command(
        "hico_jax.evals.compress.bench:main",
        "time whole inference by number of frames, with the compression on and off",
        bench_options,
        "example:\n  hico bench --model weights/ --frames 64,1000,10000",
        resume="The same command times what is left.",
    ),
    "plan": Command(
        "hico_jax.plan.run:main",
        "forecast memory, time and chip-hours of a run on a slice, before it is rented",
        None,
        PLAN_HELP,
    ),
    "world": Command(
        "hico_jax.world:main",
        "make videos with known answers, from a seed",
        _world,
        resume="The same command goes on where it stopped.",
        check=_check_world,
        epilog="examples:\n  hico world --out world --preset quick\n"
        "  hico world --film long.mp4 --seconds 1024 --needle-at 300",
    ),
    "convert": Command(
        "hico_jax.convert.command:main_convert",
        "import released PyTorch weights",
        _convert,
        "examples:\n  hico convert weights/VideoChat-Flash-Qwen2-7B_res448 models/7b\n"
        "  hico convert UMT-L_f4_vision.pt models/umt --like umt_qwen2_7b --allow-pickle",
        resume="Nothing was left behind; run the command again.",
    ),
    "export": Command(
        "hico_jax.convert.command:main_export",
        "write weights so that PyTorch reads them",
        _export,
        "examples:\n  hico export runs/stage3 out/stage3\n  hico export models/7b out/llm --part llm",
        resume="Nothing was left behind; run the command again.",
    ),
    "data": Command(
        "hico_jax.data:main",
        "check annotations and media before a run, or prepare them for a pod",
        _data,
        resume="Nothing was changed; run it again any time.",
        epilog="examples:\n  hico data check stage3.yaml\n  hico data prepare stage3.yaml --out gs://bucket/stage3",
    ),
    "doctor": Command(
        "hico_jax.doctor:main",
        "say what this machine has, what works, and how to mend the rest",
        _doctor,
        resume="Run it again any time.",
    ),
    "models": Command(
        "hico_jax.catalog:main",
        "list the models that are known by name",
        _models,
        resume="Run it again any time.",
    ),
}
