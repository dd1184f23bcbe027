"""The lmms-eval side: with a stand-in for the package here, with the package itself when it is installed (slow)."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from data_pipeline.tokenizer import Tokenizer
from hico_jax import cli
from hico_jax.convert import export
from hico_jax.models.hico import HiCo
from tests import official_files

ROOT = pathlib.Path(__file__).resolve().parents[4]
WORKER = """
import json, sys
print(json.dumps({"ready": True, "argv": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    r = json.loads(line)
    print(json.dumps({"id": r["id"], "text": f"{r['prompt']} {r['start']} {r['max_new_tokens']}"}), flush=True)
"""


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture
def model_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    base = types.ModuleType("lmms_eval.api.model")
    base.lmms = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})  # type: ignore[attr-defined]
    for name in ("lmms_eval", "lmms_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", base)
    yield importlib.import_module("hico_jax.evals.lmms.model").HicoJax
    sys.modules.pop("hico_jax.evals.lmms.model")


@pytest.fixture
def python(tmp_path: pathlib.Path) -> str:
    """A Python that runs a stand-in for the worker."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{WORKER}")
    path.chmod(0o755)
    return str(path)


def close(model: Any) -> None:
    model._worker.stdin.close()
    model._worker.wait(10)
    model._worker.stdout.close()


def test_requests_become_answers_in_order(model_class: Any, python: str) -> None:
    model = model_class("weights", python=python, max_num_frames=64)
    docs = [{"video": "b.mp4"}, {"video": "a.mp4"}, {"video": "b.mp4"}]
    model.task_dict = {"t": {"test": docs}}
    visual = lambda doc: [doc["video"], {"start": 1.5, "end": 3.0}] if doc["video"] == "a.mp4" else [doc["video"]]
    asked = [Request(f"q{i}", {"max_new_tokens": 16, "until": ["\n"]}, visual, i, "t", "test") for i in range(3)]
    assert model.generate_until(asked) == ["q0 None 16", "q1 1.5 16", "q2 None 16"]
    with pytest.raises(ValueError, match="hands over list, not"):
        model.generate_until([Request("q", {}, lambda doc: [3], 0, "t", "test")])
    with pytest.raises(NotImplementedError):
        model.loglikelihood([])
    close(model)


def test_wrong_model_args(model_class: Any, python: str) -> None:
    with pytest.raises(ValueError, match="model_args frames are not known"):
        model_class("weights", python=python, frames=3)
    with pytest.raises(ValueError, match="batch_size is 4"):
        model_class("weights", python=python, batch_size=4)


def test_a_worker_that_stops_is_an_error(model_class: Any) -> None:
    with pytest.raises(RuntimeError, match="stopped with exit code 1"):
        model_class("weights", python="/bin/false")


def test_the_entry_point_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]' in text
    assert 'hico_jax = "hico_jax.evals.lmms:manifest"' in text


TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {data}
  cache_dir: {cache}
task: hico_local
test_split: train
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: "answer"
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  do_sample: false
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from hico_jax.evals.bench import matchers, prompts


def doc_to_visual(doc):
    return [r"{videos}/" + doc["video"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return prompts.mvbench(doc)


def process_results(doc, results):
    letter = "ABCDE"[doc["candidates"].index(doc["answer"])]
    return {{"accuracy": float(matchers.mcq_letter(results[0]) == letter)}}
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lmms_eval_and_our_harness_say_the_same(
    asked_model: HiCo, words: Tokenizer, tmp_path: pathlib.Path, venv: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = os.environ.get("HICO_LMMS_MODEL")
    if weights is None:
        file = words.save(tmp_path / "tokenizer")  # type: ignore[attr-defined]
        weights = str(export.export(asked_model, tmp_path / "weights", files=[file]))
    files = official_files.make(tmp_path / "files", 3)["mvbench"]
    data = pathlib.Path(files["annotations"]) / "action_count.json"
    task = tmp_path / "task"
    task.mkdir()
    (task / "hico_local.yaml").write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    (task / "utils.py").write_text(UTILS.format(videos=files["videos"]))
    arguments = f"pretrained={weights},python={sys.executable},max_num_frames=8"
    done = subprocess.run(
        [str(venv / "bin" / "lmms-eval"), "--model", "hico_jax", "--model_args", arguments, "--tasks", "hico_local",
         "--include_path", str(task), "--batch_size", "1", "--log_samples", "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("*samples*hico_local*.jsonl")
    theirs = {}
    for row in map(json.loads, samples.read_text().splitlines()):
        said = row["filtered_resps"] if "filtered_resps" in row else row["resps"]
        while isinstance(said, list):
            said = said[0]
        theirs[row["doc_id"]] = (said, row["accuracy"])
    line = ["eval", "mvbench", "--model", weights, "--annotations", str(data), "--videos", files["videos"]]
    assert cli.main([*line, "--max-frames", "8", "--out", str(tmp_path / "ours")]) == cli.OK
    capsys.readouterr()
    ours = {}
    for row in map(json.loads, (tmp_path / "ours" / "answers.0of1.jsonl").read_text().splitlines()):
        ours[int(row["id"].split("/")[1])] = (row["answer"], row["reference"]["score"])
    assert len(ours) == 6
    assert theirs == ours
