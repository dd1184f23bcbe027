"""The benchmarks' own arithmetic, and rows in their small form."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from benchmarks.speed import models, report, rows
from hico_jax import registry
from hico_jax.batch import DropSchedule

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_rows_in_their_small_form_print_and_write_what_a_reader_needs(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "speed.json"
    names = "roofs,vision_224"
    command = [sys.executable, "-m", "benchmarks.speed", "--small", "--rows", names, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = {r["row"]: r for r in json.loads(out.read_text())}
    assert list(found) == names.split(",")
    for result in found.values():
        assert result["value"] > 0
        assert result["environment"]["platform"] == "cpu"
        assert f"| {result['row']} |" in done.stdout
    vision = found["vision_224"]
    assert vision["of_roof"] == pytest.approx(vision["value"] / vision["roof"])
    assert vision["times_recorded"] == pytest.approx(vision["value"] / 2395)
    assert vision["compile_s"] > 0
    assert set(found["roofs"]["roofs"]) == {"product", "attention", "copy"}


def test_a_row_that_dies_is_named_and_does_not_stop_the_others() -> None:
    assert report.reason(["a", "Check failed: b", "core dumped"]) == "Check failed: b"
    failed = report.complete(rows.BY_NAME["decode_7b"], {"failed": "exit code -6"})
    assert "of_roof" not in failed
    assert "failed" in report.table([failed])
    assert "exit code -6" in report.line(failed)


def test_unknown_rows_end_with_one_sentence() -> None:
    command = [sys.executable, "-m", "benchmarks.speed", "--rows", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("unknown rows nothing; known are roofs")


def test_weights_and_flops_are_those_of_the_published_models() -> None:
    config = registry.model_config("umt_qwen2_7b")
    llm = config.llm
    total = llm.num_layers * models.layer_weights(llm) + 2 * llm.vocab_size * llm.embed_dim
    assert total == pytest.approx(7.615e9, rel=1e-3)  # 7.6 billion, less biases and norms
    products, attention = models.language_flops(llm, [(28, 1000)])
    assert products == 2 * 1000 * 28 * models.layer_weights(llm)
    assert attention == 28 * 4 * 1000**2 * 3584 / 2  # two products of a token with half of all tokens
    drop = DropSchedule("uniform", (8, 16, 24), (1.0, 0.5, 0.25, 0.125))
    _, plan = models.row(registry.model_config("tiny").llm, 512, drop, text=64)
    lengths = models.groups(llm, drop, plan, 576)
    assert [count for count, _ in lengths] == [8, 8, 8, 4]
    assert [n for _, n in lengths] == [576, 320, 192, 128]


def test_a_model_of_given_parts_has_random_weights_of_the_asked_type() -> None:
    config = registry.model_config("tiny")
    model = models.build(config, jax.numpy.bfloat16, ("projector",))
    assert model.llm is None
    assert {a.dtype for a in jax.tree.leaves(model)} == {jax.numpy.dtype("bfloat16")}
