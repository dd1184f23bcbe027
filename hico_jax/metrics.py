"""What a run says about itself: metrics.jsonl, TensorBoard events, progress on the terminal, the first batch.

In: numbers of a step, on the host. Out: files in the workdir and lines on the terminal. Only the first
process writes.
"""

from __future__ import annotations

import collections
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
from etils import epath

from hico_jax.batch import Batch, Geometry

FILE = "metrics.jsonl"
TAIL = 32  # lines that a checkpoint holds

# Dense bfloat16 products per second of one chip, as its vendor states them.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(kind: str) -> float | None:
    """Peak of a device kind (the longest name it begins with); None when unknown, as for a CPU."""
    names = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def counts(batch: Batch, geometry: Geometry) -> dict[str, int]:
    """Tokens (padding left out) and video frames of a host batch."""
    slots = np.asarray(batch.slots)
    num_video = batch.clips.shape[1] * geometry.tokens_per_clip
    clip_tokens = int(((slots >= 0) & (slots < num_video)).sum())
    return {
        "tokens": int((np.asarray(batch.segments) > 0).sum()),
        "frames": clip_tokens // geometry.tokens_per_clip * geometry.frames_per_clip,
    }


def rates(count: Mapping[str, int], step_s: float, wait_s: float, flops: float, peak: float | None) -> dict[str, float]:
    """Throughput of one step. `flops` are those of all devices, `peak` is of all devices too."""
    seconds = max(step_s, 1e-9)
    found = {f"{name}_per_s": number / seconds for name, number in count.items()}
    found |= {"step_s": step_s, "wait_percent": 100 * wait_s / seconds}
    if peak:
        found["mfu_percent"] = 100 * flops / seconds / peak
    return found


class Writer:
    """`metrics.jsonl`, one line a step, and the same as TensorBoard events.

    `resume` is the step the run goes on from: what an earlier process wrote after it is dropped, so that a
    killed and resumed run reads like one that was never stopped. `tail` are the last lines as the checkpoint
    holds them: those that are missing from the file are put back.
    """

    def __init__(self, workdir: str, resume: int = 0, tail: Iterable[Mapping[str, Any]] = ()) -> None:
        self._tail: collections.deque[dict[str, Any]] = collections.deque(maxlen=TAIL)
        self.active = jax.process_index() == 0
        self._events: Any = None
        if not self.active:
            return
        self._path = epath.Path(workdir) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read(workdir) if line["step"] <= resume]
        have = {line["step"] for line in kept}
        kept = sorted([*kept, *(dict(t) for t in tail if t["step"] not in have)], key=lambda line: line["step"])
        self._tail.extend(kept)
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        if "://" not in workdir:  # tensorboardX writes to local folders only
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(epath.Path(workdir) / "events"), purge_step=resume + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add one step. Flushed at once: what was printed is on disk."""
        if not self.active:
            return
        self._tail.append({"step": step, **values})
        with self._path.open("a") as file:
            file.write(json.dumps(self._tail[-1]) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def tail(self) -> list[dict[str, Any]]:
        """The last lines, for the checkpoint."""
        return list(self._tail)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def write_whole(path: epath.Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def read(workdir: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics. A last line cut short by a kill is left out."""
    path = epath.Path(workdir) / FILE
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Progress:
    """One live line on a terminal, plain lines elsewhere. Also says what takes long before the first step."""

    def __init__(self, steps: int, every: int, *, start: int = 0, title: str = "", out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._quiet = jax.process_index() != 0
        self._steps, self._every, self._title = steps, every, title
        self._start, self._began = start, time.monotonic()
        self._first: float | None = None  # when the first step was done
        self._bar: Any = None
        if self._out.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.fields[numbers]}"), console=Console(file=self._out))
            self._task = self._bar.add_task(title, total=steps, completed=start, numbers="")
            self._bar.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._out, flush=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """After `step` steps."""
        numbers = _brief(values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step in (self._start + 1, self._steps):
            self.say(f"{self._title} {step}/{self._steps}  {numbers}  {self._left(step)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int) -> str:
        now = time.monotonic()
        if step == self._steps:
            return f"took {_duration(now - self._began)}"
        if self._first is None:  # this step has compiled: it tells nothing
            self._first = now
            return ""
        return f"{_duration((now - self._first) / (step - self._start - 1) * (self._steps - step))} left"


def _brief(values: Mapping[str, float]) -> str:
    forms = {
        "loss": "loss {:.4f}", "accuracy": "acc {:.3f}", "grad_norm": "grad {:.3g}", "lr": "lr {:.2g}",
        "tokens_per_s": "{:,.0f} tok/s", "frames_per_s": "{:,.0f} frames/s", "wait_percent": "wait {:.0f}%",
        "mfu_percent": "mfu {:.1f}%",
    }  # fmt: skip
    return "  ".join(form.format(values[name]) for name, form in forms.items() if name in values)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def contact_sheet(
    batch: Batch, path: epath.PathLike, *, decode: Callable[[Sequence[int]], str] | None = None, rows: int = 6
) -> None:
    """Draw what the model is about to see: a strip of frames for each row, and its text below.

    Supervised text stands in green after an arrow; runs of visual tokens are written as their number.
    """
    from PIL import Image, ImageDraw, ImageFont

    side, width, text_height = 96, 8, 66
    rows = min(rows, batch.tokens.shape[0])
    sheet = Image.new("RGB", (side * width, (side + text_height) * rows), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for row in range(rows):
        top = row * (side + text_height)
        for i, frame in enumerate(_frames(batch, row, width)):
            sheet.paste(Image.fromarray(frame).resize((side, side)), (i * side, top))
        prompt, answer = row_text(batch, row, decode)
        for line, (text, colour) in enumerate(((prompt[-256:-128], "black"), (prompt[-128:], "black"),
                                               ("-> " + answer[:120], "green"))):  # fmt: skip
            draw.text((2, top + side + 2 + 20 * line), text.encode("ascii", "replace").decode(), colour, font)
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with epath.Path(path).open("wb") as file:
        sheet.save(file, format="PNG")


def _frames(batch: Batch, row: int, limit: int) -> list[np.ndarray]:
    clips, images = np.asarray(batch.clips[row]), np.asarray(batch.images[row])
    every = [*clips.reshape(-1, *clips.shape[2:]), *images]
    picked = [every[i] for i in np.linspace(0, len(every) - 1, min(limit, len(every))).astype(int)] if every else []
    return [_displayable(frame) for frame in picked]


def _displayable(frame: np.ndarray) -> np.ndarray:
    if frame.dtype == np.uint8:
        return frame
    low, high = float(frame.min()), float(frame.max())
    return ((frame - low) / max(high - low, 1e-6) * 255).astype(np.uint8)


def row_text(batch: Batch, row: int, decode: Callable[[Sequence[int]], str] | None = None) -> tuple[str, str]:
    """A row as text: all of it (visual runs as `[N visual]`), and what it is asked to say."""
    show = decode or (lambda ids: " ".join(str(i) for i in ids))
    tokens, slots = np.asarray(batch.tokens[row]), np.asarray(batch.slots[row])
    real = np.asarray(batch.segments[row]) > 0
    parts: list[str] = []
    position = 0
    while position < len(tokens) and real[position]:
        visual, start = slots[position] >= 0, position
        while position < len(tokens) and real[position] and (slots[position] >= 0) == visual:
            position += 1
        run = tokens[start:position].tolist()
        parts.append(f"[{len(run)} visual]" if visual else show(run))
    last_of_run = np.append(slots[1:] < 0, True)  # a run of visual tokens repeats the target after it
    supervised = (np.asarray(batch.weights[row]) > 0) & last_of_run
    answer = show(np.asarray(batch.targets[row])[supervised].tolist())
    return "".join(parts).replace("\n", " "), answer.replace("\n", " ")
