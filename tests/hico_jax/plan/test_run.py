"""`hico plan` as typed."""

from __future__ import annotations

import json

import pytest

from hico_jax.cli import main
from hico_jax.plan import compile as c
from hico_jax.plan import run

BASE = ["plan", "--config=configs/stage3_sft.py:umt_qwen2_7b"]


def test_a_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [*BASE, "--topology=v5p:4x4x4", "--config.data.max_tokens=1048576", "--json", "--config.optim.accumulate=1"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"]["sequence"] == 64
    assert found["peak_gib"] < found["hbm_gib"]
    assert main([*BASE, "--topology=v5p:4x4x4", "--tokens=1048576", "--prefill"]) == 0
    assert "cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sent", "says"),
    [({"all-reduce": (3, 6 << 20)}, "all-reduce  3 of 6.0 MiB in all"), ({}, "nothing is sent"), (None, "unknown")],
)
def test_what_the_compiler_said_is_printed_and_what_it_did_not_say(
    sent: dict[str, tuple[int, int]] | None, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "_compiled", lambda *_: c.record(c.Compiled(3 << 30, 1 << 30, 2 << 30, 0, 9.0, sent)))
    assert main([*BASE, "--topology=v5p:4x4x4", "--compile"]) == 0
    out = capsys.readouterr().out
    assert " ".join(says.split()) in " ".join(out.split())
    assert "3.00 GiB" in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "no --topology is given"),
        (["--topology=v5x:4x4"], "did you mean v5"),
        (["--topology=v5p:4x4x4", "--tokens=many"], "--tokens is 'many'"),
        (["--topology=v5p:4x4x4", "--config.mesh.fsdp=48"], "needs 48 devices but there are 64"),
        (["--topology=v5p:4x4x4", "--config.mesh.tensor=8"], "mesh.tensor=8; use a divisor of 4"),
        (["--topology=v5p:4x4x4", "--tokns=8"], "unknown flag --tokns; did you mean --tokens?"),
        (["--topology=v5p:4x4x4", "--frobnicate"], "unknown flag --frobnicate; known are --config"),
        (["--topology=v5p:4x4x4", "--rows=3", "--config.optim.accumulate=2"], "3 rows do not divide into"),
        (["--topology=v5p:4x4x4", "--tokens=1000000"], "use a multiple of 16384, for example 1015808"),
        (["--topology=v5e:2x2", "--tokens=1048576"], "GiB too few"),
    ],
)
def test_mistakes_are_one_sentence(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, *flags]) == 2
    assert says in capsys.readouterr().err
