"""The worker's side of the pipe, without a model."""

from __future__ import annotations

import io
import json
import pathlib
from typing import Any

import pytest

from hico_jax.evals.lmms import worker
from tests.parrot import Parrot


def test_a_line_in_a_line_out(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v.mp4").touch()
    asked: list[dict[str, Any]] = [
        {"id": 0, "video": str(tmp_path / "v.mp4"), "prompt": "Who?", "max_new_tokens": 4},
        {"id": 1, "video": str(tmp_path / "v.mp4"), "prompt": "When?", "max_new_tokens": 4},
        {"id": 2, "video": str(tmp_path / "gone.mp4"), "prompt": "Who?", "max_new_tokens": 4},
        {"id": 3, "video": str(tmp_path / "v.mp4"), "prompt": "Who?", "max_new_tokens": 4, "start": 1, "end": 2},
    ]
    parrot, out = Parrot(), io.StringIO()
    worker.serve(parrot, [json.dumps(a) + "\n" for a in asked], out)
    ready, *answers = map(json.loads, out.getvalue().splitlines())
    assert ready == {"ready": True}
    assert [a["id"] for a in answers] == [0, 1, 2, 3]
    assert answers[2]["text"] == ""
    assert answers[0]["text"] == answers[3]["text"]
    assert len(parrot.watched) == 3  # the first two share a watch
    assert "gone.mp4: no such file; answered with nothing" in capsys.readouterr().err
