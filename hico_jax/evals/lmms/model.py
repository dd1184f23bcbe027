"""What lmms-eval sees of a model: it hands over a video and a text, and gets an answer.

    lmms-eval --model hico_jax --model_args pretrained=WEIGHTS,python=HICO_PYTHON,max_num_frames=512 --tasks ...

In: requests of lmms-eval. Out: answers, from a worker in another environment.
Next: hico_jax/evals/lmms/worker.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]


class HicoJax(lmms):
    """A `hico_jax` model, one question at a time, greedy.

    Args:
      pretrained: folder of released, exported or trained weights.
      python: the Python that has hico_jax and JAX; the one that runs lmms-eval unless given.
      max_num_frames: frames at most; 512 as the reference's scripts.
      drop: video-level compression as of `hico ask --drop`, with `;` for `,`.
      repetition_penalty: the model's own unless given.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        python: str = sys.executable,
        max_num_frames: int = 512,
        drop: str = "",
        repetition_penalty: float | None = None,
        batch_size: int | str = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(kwargs) - {"device", "max_batch_size", "use_cache"})
        if unknown:
            raise ValueError(f"model_args {', '.join(unknown)} are not known to hico_jax")
        if int(batch_size) != 1:
            raise ValueError(f"batch_size is {batch_size}; hico_jax answers one question at a time")
        command = [python, "-m", "hico_jax.evals.lmms.worker", pretrained, str(max_num_frames)]
        command += [drop.replace(";", ",") or "none", "" if repetition_penalty is None else str(repetition_penalty)]
        self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._receive()  # what it says once it is ready

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests; those about one video are asked together."""
        asked = []
        for place, request in enumerate(requests):
            text, options, doc_to_visual, doc_id, task, split = request.args
            visual = doc_to_visual(self.task_dict[task][split][doc_id])
            path, *more = visual if isinstance(visual, list | tuple) and len(visual) else (None,)
            if not isinstance(path, str | os.PathLike):
                raise ValueError(f"task {task} hands over {type(visual).__name__}, not [video path] or [path, options]")
            part = more[0] if more and isinstance(more[0], dict) else {}
            asked.append({
                "id": place, "video": os.fspath(path), "prompt": text,
                "max_new_tokens": int(options.get("max_new_tokens", 1024)),
                "start": part.get("start"), "end": part.get("end"), "reader": part.get("video_read_type"),
            })  # fmt: skip
        answers = [""] * len(asked)
        for one in sorted(asked, key=lambda r: (r["video"], str(r["start"]), str(r["end"]), r["id"])):
            self._send(one)
            answers[one["id"]] = self._receive()["text"]
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("hico_jax generates; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("hico_jax answers single questions under lmms-eval")

    def _send(self, message: dict[str, Any]) -> None:
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps(message) + "\n")
        self._worker.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._worker.stdout is not None
        line = self._worker.stdout.readline()
        if not line:
            with self._worker:  # closes the pipes
                code = self._worker.wait()
            raise RuntimeError(f"the hico_jax worker stopped with exit code {code}; see its message above")
        return json.loads(line)
