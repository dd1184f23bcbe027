"""Many files through one confined process, made anew where a file ends it: reads what `hico serve` reads, faster.

The server makes a process for every file, which takes five times as long as reading a small one. Here a process that
gave up the same things (network, writing, memory; time anew for each file) reads one file after another.

In: lines of JSON on standard input, a list of paths each (or `[path, true]` of a picture). Out: a line for each file.
Next: benchmarks/serve_fuzz.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hico_jax.serve import decoder  # noqa: E402

LIMITS = {signal.SIGALRM: "ended by a limit", signal.SIGXCPU: "ended by a limit"}


class Readers:
    """Such a process, and its answers."""

    def __init__(self, limits: decoder.Limits, job: dict[str, Any]) -> None:
        told = json.dumps({"limits": dataclasses.asdict(limits), "job": job})
        command = [sys.executable, __file__, told]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self, files: Sequence[tuple[str, bool]]) -> list[dict[str, Any]]:
        """What came of each: `found` ("read", "refused", or what ended the process), `said`, `seconds`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(files) + "\n")
        self.process.stdin.flush()
        return [json.loads(self.process.stdout.readline()) for _ in files]

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def _one(path: str, picture: bool, limits: decoder.Limits, job: dict[str, Any]) -> dict[str, Any]:
    try:
        frames = decoder._picture(path, limits) if picture else decoder._film(path, limits, **job)
        return {"found": "read", "said": sum(1 for _ in frames)}
    except MemoryError:
        return {"found": "refused", "said": "reading this file took more memory than is allowed"}
    except ValueError as error:  # what a client would be told
        return {"found": "refused", "said": str(error).replace(f"{path}: ", "").replace(path, "the file")}
    except Exception as error:
        return {"found": f"{type(error).__name__}", "said": str(error)}


def _child(files: Sequence[tuple[str, bool]], writer: int, limits: decoder.Limits, job: dict[str, Any]) -> None:
    decoder._confine(dataclasses.replace(limits, seconds=limits.seconds * len(files)))
    for path, picture in files:
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
        began = time.perf_counter()
        told = _one(path, picture, limits, job) | {"seconds": time.perf_counter() - began}
        os.write(writer, json.dumps(told).encode() + b"\n")


def _lines(reader: int, seconds: float) -> Iterator[str]:
    """Lines until the writer is gone, or says nothing for so long."""
    held = b""
    while select.select([reader], [], [], seconds)[0] and (part := os.read(reader, 1 << 16)):
        *whole, held = (held + part).split(b"\n")
        yield from (line.decode() for line in whole)


def _batch(files: list[tuple[str, bool]], limits: decoder.Limits, job: dict[str, Any]) -> Iterator[str]:
    while files:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reader)
            with contextlib.suppress(BaseException):
                _child(files, writer, limits, job)
            os._exit(0)
        os.close(writer)
        done = 0
        for line in _lines(reader, limits.seconds + 10):
            done += 1
            yield line
        os.close(reader)
        if done == len(files):
            os.waitpid(child, 0)
            return
        gone, status = os.waitpid(child, os.WNOHANG)
        if not gone:
            time.sleep(0.2)
            gone, status = os.waitpid(child, os.WNOHANG)
        found = "hung beyond its limit"
        if not gone:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        elif os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status))
            found = LIMITS.get(name, f"ended its process ({name.name})")
        else:
            found = "left its process"
        yield json.dumps({"found": found, "said": "", "seconds": limits.seconds})
        files = files[done + 1 :]


def main(told: str) -> None:
    """Read batches until there are no more."""
    task = json.loads(told)
    limits = decoder.Limits(**task["limits"])
    for line in sys.stdin:
        for answer in _batch([tuple(one) for one in json.loads(line)], limits, task["job"]):
            print(answer, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
