"""Options of the commands that measure a model, and what reads numbers from a command line. Imports nothing heavy.

In: text. Out: values, or one sentence about what is wrong. `cli.py` puts them together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

DTYPE_HELP = "of parameters and activations (the model's own; float32 on a CPU)"


def parse_drop(text: str) -> tuple[str, tuple[int, ...], tuple[float, ...]]:
    """The arguments of `batch.DropSchedule`, which checks what they mean.

    Example:
      >>> parse_drop("uniform0_attention:4,18:1,0.5,0.25")
      ('uniform0_attention', (4, 18), (1.0, 0.5, 0.25))
      >>> parse_drop("none")
      ('none', (), (1.0,))

    Raises:
      argparse.ArgumentTypeError: not three parts, or something that is no number.
    """
    if text == "none":
        return "none", (), (1.0,)
    try:
        kind, layers, ratios = text.split(":")
        return kind, tuple(int(n) for n in layers.split(",")), tuple(float(r) for r in ratios.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not read as KIND:LAYERS:RATIOS, for example uniform0_attention:4,18:1,0.5,0.25"
        ) from None


def number(kind: type, fits: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """A parser of numbers that fit."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


count = number(int, lambda n: n >= 0, "a whole number, 0 or more")
positive = number(int, lambda n: n >= 1, "a whole number, 1 or more")
seconds = number(float, lambda s: 0 <= s < float("inf"), "a time in seconds, 0 or more")
not_negative = number(float, lambda x: 0 <= x < float("inf"), "a number, 0 or more")
share = number(float, lambda p: 0 <= p <= 1, "a number from 0 to 1")
fraction = number(float, lambda p: 0 < p <= 1, "a number above 0 and at most 1")


def list_of(one: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    """A parser of values between commas."""
    return lambda text: tuple(one(part) for part in text.split(","))


def parse_schedule(text: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Layers and ratios of a drop of any kind.

    Example:
      >>> parse_schedule("4,18:1,0.5,0.25")
      ((4, 18), (1.0, 0.5, 0.25))

    Raises:
      argparse.ArgumentTypeError: not two parts, or something that is no number.
    """
    try:
        return parse_drop(f"uniform:{text}")[1:]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not read as LAYERS:RATIOS, for example 4,18:1,0.5,0.25"
        ) from None


def eval_options(parser: argparse.ArgumentParser) -> None:
    """Options of `hico eval`."""
    parser.add_argument("name", metavar="NAME", help="mvbench, mlvu, lvbench, perceptiontest, longvideobench, "
                        "videomme, videomme_w_subtitle or charades_sta")  # fmt: skip
    parser.add_argument(
        "--model", metavar="FOLDER", required=True, help="released, exported or trained weights, or nano"
    )
    parser.add_argument(
        "--annotations", metavar="PATH", required=True, help="the official annotation file, or the folder it is in"
    )
    parser.add_argument("--videos", metavar="DIR", help="folder of the videos (that of the annotations)")
    parser.add_argument("--subtitles", metavar="DIR", help="folder of the subtitles, where the benchmark reads them")
    parser.add_argument("--out", metavar="DIR", help="where answers and reports go (runs/eval/NAME)")
    parser.add_argument("--max-frames", metavar="N", type=positive, help="(the reference's: 512, or 640 for LVBench)")
    parser.add_argument("--limit", metavar="N", type=positive, help="only the first N questions of each file")
    parser.add_argument("--shard", metavar="I/N", type=parse_shard, default=(0, 1), help="this process's share, from 0")
    parser.add_argument("--drop", metavar="KIND:LAYERS:RATIOS", type=parse_drop, help="as of `hico ask`")
    parser.add_argument(
        "--repetition-penalty", metavar="R", type=not_negative, help="(the model's generation_config.json, as there)"
    )
    parser.add_argument("--fresh", action="store_true", help="ask everything anew")


def check_eval(args: argparse.Namespace) -> None:
    """What one option of `hico eval` alone cannot tell."""
    if args.fresh and args.shard[1] > 1:
        raise ValueError("--fresh would take away what other shares have answered; choose a new --out instead")


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N` as numbers.

    Raises:
      argparse.ArgumentTypeError: not two numbers with 0 <= I < N.
    """
    index, _, number = text.partition("/")
    if not (index.isdigit() and number.isdigit() and int(index) < int(number)):
        raise argparse.ArgumentTypeError(f"{text!r} does not read as I/N with I from 0 to N - 1, for example 0/8")
    return int(index), int(number)


def niah_options(parser: argparse.ArgumentParser) -> None:
    """Options of `hico niah`."""
    parser.add_argument(
        "--model", metavar="FOLDER", required=True, help="released, exported or trained weights, or nano"
    )
    parser.add_argument("--out", metavar="DIR", default="runs/niah", help="where everything is written (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on from what DIR holds")
    hidden = parser.add_argument_group("what is hidden, and where (the made-up world, so that no download is needed)")
    hidden.add_argument("--haystack", metavar="VIDEO", help="the film; one frame a second is taken")
    hidden.add_argument("--repeat", action="store_true", help="show a film that is too short again and again")
    hidden.add_argument("--needles", metavar="FILE.json", help="pictures and questions in the paper's format")
    hidden.add_argument("--images", metavar="DIR", help="where its pictures are (beside the file)")
    hidden.add_argument(
        "--hops", metavar="N", type=positive, default=1, help="2 or more: chains of hints (%(default)s)"
    )
    hidden.add_argument(
        "--decoys", metavar="N", type=count, default=0,
        help="so many cards of a second chain, so that the last card is not the only one without a hint (%(default)s)",
    )  # fmt: skip
    hidden.add_argument("--count", metavar="N", type=positive, default=20, help="how many needles (%(default)s)")
    hidden.add_argument(
        "--think", action="store_true", help="with --hops: the model names every card it passes before it answers"
    )
    hidden.add_argument("--letters", action="store_true", help="ask the made-up world's questions with four options")
    hidden.add_argument("--seed", type=count, default=0, help="of the made-up world (%(default)s)")
    tried = parser.add_argument_group("what is tried")
    tried.add_argument(
        "--frames", metavar="N,N", type=list_of(positive), default=(64, 256, 1024), help="lengths (64,256,1024)"
    )
    tried.add_argument(
        "--depths", metavar="D,D", type=list_of(share), default=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), help="from 0 to 1"
    )
    tried.add_argument(
        "--controls", metavar="NAME,NAME", default="",
        help="beside the film without a needle: blank, shuffled, dropped, blind; or all",
    )  # fmt: skip
    tried.add_argument("--drop", metavar="KIND:LAYERS:RATIOS", type=parse_drop, help="as of `hico ask`")
    tried.add_argument("--insertion", choices=("both", "feature", "pixel"), default="both", help="(%(default)s)")
    tried.add_argument(
        "--prompt", choices=("paper", "chat"), help="without the time message, or as `hico ask` (paper for --needles)"
    )
    tried.add_argument(
        "--devices", metavar="N", type=positive, default=1, help="split every row over so many devices (%(default)s)"
    )


def compress_options(parser: argparse.ArgumentParser) -> None:
    """Options of `hico compress`."""
    parser.add_argument(
        "--model", metavar="FOLDER", required=True, help="released, exported or trained weights, or nano"
    )
    parser.add_argument("--out", metavar="DIR", default="runs/compress", help="(%(default)s)")
    parser.add_argument("--methods", metavar="NAME,NAME", default="all", help="(%(default)s)")
    parser.add_argument("--tokens-per-frame", metavar="N", type=positive, help="of every method (the model's own)")
    parser.add_argument(
        "--schedule", metavar="LAYERS:RATIOS", type=parse_schedule,
        help="of the methods that drop, for example 4,18:1,0.5,0.25 (the model's own)",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", metavar="A:B,C:D", help="methods to compare (each with the first; drops with drop-uniform)"
    )
    parser.add_argument("--max-frames", metavar="N", type=positive, help="at most this many frames of a video")
    parser.add_argument("--seed", type=count, default=0, help="of the made-up world (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on from what DIR holds")
    asked = parser.add_argument_group("what is asked (the made-up world, by kind of task)")
    asked.add_argument("--films", metavar="N", type=positive, default=8, help="of each kind (%(default)s)")
    asked.add_argument("--seconds", metavar="S", type=positive, default=64, help="of the long ones (%(default)s)")
    asked.add_argument("--chains", metavar="N", type=count, default=0, help="films with a chain of hints, too (none)")
    asked.add_argument("--benchmark", metavar="NAME", help="or a benchmark of `hico eval`")
    asked.add_argument("--annotations", metavar="PATH", help="of the benchmark")
    asked.add_argument("--videos", metavar="DIR", help="of the benchmark")
    asked.add_argument("--subtitles", metavar="DIR", help="of the benchmark")
    asked.add_argument("--limit", metavar="N", type=positive, help="only the first N questions of each file")


def compare_options(parser: argparse.ArgumentParser) -> None:
    """Options of `hico compare`."""
    parser.add_argument("first", metavar="DIR", help="of `hico eval`, `hico niah` or one method of `hico compress`")
    parser.add_argument("second", metavar="DIR", help="another one that asked the same questions")
    parser.add_argument("--json", metavar="FILE", help="write the differences there, too")


def quantize_option(parser: argparse._ActionsContainer) -> None:
    """What `quantize.quantized` takes."""
    parser.add_argument(
        "--quantize", choices=("int8",), help="hold the language model's weights in 8 bits (docs/speed.md); a GPU then "
        "answers faster, other machines need less memory",
    )  # fmt: skip


def bench_options(parser: argparse.ArgumentParser) -> None:
    """Options of `hico bench`."""
    parser.add_argument(
        "--model", metavar="FOLDER", required=True, help="released, exported or trained weights, or nano"
    )
    parser.add_argument("--out", metavar="DIR", default="runs/bench", help="(%(default)s)")
    parser.add_argument(
        "--frames", metavar="N,N", type=list_of(positive), default=(64, 256, 1000, 4000, 10000),
        help="lengths (64,256,1000,4000,10000)",
    )  # fmt: skip
    parser.add_argument("--film", metavar="VIDEO", help="its first frames are used (a film is made)")
    parser.add_argument(
        "--drop", dest="drop_text", metavar="KIND:LAYERS:RATIOS", type=_drop_text, help="the video level's schedule"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=positive, default=200_000, help="longer rows are left out (%(default)s)"
    )
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=0.0, help="of one line; 0 is none (%(default)s)"
    )
    quantize_option(parser)
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on from what DIR holds")


def _drop_text(text: str) -> str:
    parse_drop(text)
    return text


def serve_options(parser: argparse.ArgumentParser) -> None:
    """Options of `hico serve`. Keys come from HICO_API_KEY or HICO_API_KEYS, so that no process list shows them."""
    parser.add_argument(
        "--model", metavar="FOLDER", help="released, exported or trained weights, or nano (runs/demo/model)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=DTYPE_HELP)
    parser.add_argument("--name", metavar="NAME", help="of the model, in the protocol (the folder's)")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s); others need HICO_API_KEY")
    parser.add_argument("--port", metavar="N", type=count, default=8000, help="0 takes a free one (%(default)s)")
    parser.add_argument("--host-name", metavar="NAME", action="append", default=[], help="a name it may be called by")
    asked = parser.add_argument_group("how it answers")
    asked.add_argument("--lanes", metavar="NxTOKENS,..", type=parse_lanes, help="conversations at once, by size")
    asked.add_argument("--piece", metavar="N", type=positive, help="tokens of a prompt between two of an answer")
    asked.add_argument("--queue", metavar="N", type=positive, default=64, help="how many may wait (%(default)s)")
    asked.add_argument("--drop", metavar="KIND:LAYERS:RATIOS", type=parse_drop, help="as of `hico ask`")
    asked.add_argument("--max-frames", metavar="N", type=positive, help="of a video (the model's own limit)")
    asked.add_argument("--max-new-tokens", metavar="N", type=positive, default=1024, help="(%(default)s)")
    quantize_option(asked)
    warm = asked.add_mutually_exclusive_group()
    warm.add_argument("--no-warm", action="store_true", help="listen at once; the first requests compile")
    warm.add_argument("--warm-all", action="store_true", help="listen when nothing is left to compile")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--allow-host", metavar="HOST", action="append", default=[], help="whose URLs are read (none)")
    limits.add_argument("--max-upload", metavar="BYTES", type=positive, default=512 << 20, help="(%(default)s)")
    limits.add_argument("--max-seconds", metavar="S", type=seconds, default=14400.0, help="of a video (%(default)s)")
    limits.add_argument(
        "--max-source-frames", metavar="N", type=positive, default=36_000, help="in a video, seen or not (%(default)s)"
    )
    limits.add_argument("--read-seconds", metavar="S", type=seconds, default=120.0, help="to read one (%(default)s)")
    limits.add_argument("--request-seconds", metavar="S", type=seconds, default=300.0, help="to answer (%(default)s)")
    limits.add_argument(
        "--rate", metavar="N", type=count, help="requests a minute of one key or address (600; on 127.0.0.1 any number)"
    )
    limits.add_argument("--connections", metavar="N", type=positive, default=256, help="at once (%(default)s)")
    limits.add_argument("--work", metavar="DIR", help="where uploads are kept until it stops (a temporary folder)")


def parse_lanes(text: str) -> tuple[tuple[int, int], ...]:
    """`NxTOKENS,NxTOKENS` as numbers.

    Example:
      >>> parse_lanes("8x2048,1x32768")
      ((8, 2048), (1, 32768))

    Raises:
      argparse.ArgumentTypeError: something that is no pair of positive numbers.
    """
    try:
        pairs = tuple((int(n), int(size)) for n, size in (part.split("x") for part in text.split(",")))
    except ValueError:
        pairs = ()
    if not pairs or any(n < 1 or size < 64 for n, size in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} does not read as NxTOKENS,NxTOKENS with at least 64 tokens, for example 8x2048,1x32768"
        )
    return pairs
