"""Every benchmark of the paper through the real lmms-eval and through `hico eval`: the same answers, the same scores.

Prompts and official-format files are the same on both sides; lmms-eval asks, collects and averages on its own. Where
its own matcher is the one that the reference used (MVBench, PerceptionTest) or reads what the model writes
(Charades-STA), its score stands beside ours too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline.tokenizer import Tokenizer
from hico_jax import cli, registry
from hico_jax.convert import export
from hico_jax.evals.bench import tasks
from hico_jax.models.hico import HiCo
from tests import official_files

ROOT = pathlib.Path(__file__).resolve().parents[4]

TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {folder}/{name}.jsonl
  cache_dir: {folder}/cache
task: hico_{name}
test_split: train
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "prompt"
doc_to_target: "expected"
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - {{metric: reference, aggregation: mean, higher_is_better: true}}
  - {{metric: strict, aggregation: mean, higher_is_better: true}}
  - {{metric: public, aggregation: mean, higher_is_better: true}}
"""

# Imported by lmms-eval: our judges in its process, and its own beside them.
UTILS = """
from hico_jax.evals.bench import tasks


def doc_to_visual(doc):
    part = {"start": doc["start"], "end": doc["end"], "video_read_type": doc["reader"]}
    return [doc["video"], {k: v for k, v in part.items() if v is not None}]


def public(doc, results):
    letters = "ABCDE"
    if doc["benchmark"] == "mvbench":
        from lmms_eval.tasks.mvbench.utils import mvbench_process_results

        options = doc["options"]
        told = {"candidates": options, "answer": options[letters.index(doc["expected"])]}
        return mvbench_process_results(told, results)["mvbench_accuracy"]["score"]
    if doc["benchmark"] == "perceptiontest":
        from lmms_eval.tasks.perceptiontest.val.utils import perceptiontest_val_process_results_mc

        told = {"video_name": doc["video"], "question": "", "answer_id": letters.index(doc["expected"])}
        return perceptiontest_val_process_results_mc(told, results)["accuracy"]["correct"]
    if doc["benchmark"] == "charades_sta":
        from lmms_eval.tasks.charades_sta import utils

        key = "video>>>caption>>>" + str(list(doc["span"]))
        return utils._temporal_grounding_compute_metrics([{key: results[0]}])["mIOU"] / 100
    return -1.0


def process_results(doc, results):
    benchmark = tasks.BENCHMARKS[doc["benchmark"]]
    fields = {k: doc[k] for k in ("id", "prompt", "expected", "video", "key")}
    span = None if doc["span"] is None else tuple(doc["span"])
    item = tasks.Item(source="", groups={}, options=tuple(doc["options"]), span=span, **fields)
    return {
        "reference": benchmark.reference(item, results[0]).score,
        "strict": (benchmark.own or tasks.strict)(item, results[0]).score,
        "public": float(public(doc, results)),
    }
"""


def talker(words: Tokenizer) -> HiCo:
    """A tiny random model that can only say letters, digits, a dash, and that it has done: its answers are scored."""
    config = registry.model_config("tiny")
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, vocab_size=512, tied=False))
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(31)

    def value(keys: Any, leaf: Any) -> Any:
        norm = any(getattr(key, "key", None) == "scale" for key in keys)
        return jnp.ones(leaf.shape) if norm else jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)

    model = nnx.merge(graph, jax.tree_util.tree_map_with_path(value, state))
    said = np.zeros(512, np.float32)
    for text in "ABCD0123456789-":
        (token,) = words.encode(text)
        said[token] = 1.3 if text == "-" else 1.0
    said[list(words.eos_ids)] = 1.0
    model.llm.unembedding[...] = model.llm.unembedding[...] * said
    return model


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_benchmark_scores_the_same_under_lmms_eval(
    words: Tokenizer, tmp_path: pathlib.Path, venv: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = os.environ.get("HICO_LMMS_MODEL")
    if weights is None:
        file = words.save(tmp_path / "tokenizer")  # type: ignore[attr-defined]
        weights = str(export.export(talker(words), tmp_path / "weights", files=[file]))
    files = official_files.make(tmp_path / "files", 3)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "utils.py").write_text(UTILS)
    for name, benchmark in tasks.BENCHMARKS.items():
        items = tasks.read(benchmark, tasks.Sources(**{k: pathlib.Path(v) for k, v in files[name].items()}))
        lines = [json.dumps(dataclasses.asdict(item) | {"benchmark": name, "groups": None}) for item in items]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        told = TASK.format(folder=folder, name=name, max_new_tokens=benchmark.max_new_tokens)
        (folder / f"hico_{name}.yaml").write_text(told)
    done = subprocess.run(
        [str(venv / "bin" / "lmms-eval"), "--model", "hico_jax", "--model_args",
         f"pretrained={weights},python={sys.executable},max_num_frames=8",
         "--tasks", ",".join(f"hico_{name}" for name in tasks.BENCHMARKS), "--include_path", str(folder),
         "--batch_size", "1", "--log_samples", "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "JAX_PLATFORMS": "cpu",
             "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (totals,) = (tmp_path / "out").rglob("*results.json")
    means = json.loads(totals.read_text())["results"]
    letters = 0
    for name in tasks.BENCHMARKS:
        (samples,) = (tmp_path / "out").rglob(f"*samples*hico_{name}.jsonl")
        theirs = {}
        for row in map(json.loads, samples.read_text().splitlines()):
            said = row["filtered_resps"] if "filtered_resps" in row else row["resps"]
            while isinstance(said, list):
                said = said[0]
            theirs[row["doc_id"]] = (said, row["reference"], row["strict"], row["public"])
        given = [word for key, value in files[name].items() for word in (f"--{key}", value)]
        line = ["eval", name, "--model", weights, *given, "--max-frames", "8", "--out", str(tmp_path / "ours" / name)]
        assert cli.main(line) == cli.OK
        capsys.readouterr()
        (answers,) = (tmp_path / "ours" / name).glob("answers.*.jsonl")
        ours = {row["id"]: row for row in map(json.loads, answers.read_text().splitlines())}
        order = [json.loads(row)["id"] for row in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert len(theirs) == len(ours) == len(order)
        for place, identity in enumerate(order):
            row, (said, reference, strict, public) = ours[identity], theirs[place]
            assert said == row["answer"], (name, identity)
            if row["status"] != "empty":
                assert (reference, strict) == (row["reference"]["score"], row["strict"]["score"]), (
                    name,
                    identity,
                    said,
                )
            if public >= 0:
                assert public == pytest.approx(row["reference"]["score"]), (name, identity, said)
            letters += row["strict"]["parsed"] is not None
        summary = json.loads((tmp_path / "ours" / name / "summary.json").read_text())
        mean = means[f"hico_{name}"]["strict,none"]
        assert mean == pytest.approx(summary["strict"]["score"]["share"]), name
        with capsys.disabled():
            print(
                f"\n{name}: {len(ours)} questions, strict {mean:.4f} in both, reference {summary['reference']['score']}"
            )
    assert letters > 0  # or nothing was compared
