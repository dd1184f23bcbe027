"""`hico plan` as typed."""

from __future__ import annotations

import json

import pytest

from hico_jax.cli import main

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
    ("flags", "says"),
    [
        ([], "no --topology is given"),
        (["--topology=v5x:4x4"], "did you mean v5"),
        (["--topology=v5p:4x4x4", "--tokens=many"], "--tokens is 'many'"),
        (["--topology=v5p:4x4x4", "--config.mesh.fsdp=48"], "needs 48 chips"),
        (["--topology=v5p:4x4x4", "--config.mesh.tensor=8"], "cannot be split over mesh.tensor=8"),
        (["--topology=v5p:4x4x4", "--tokens=1000000"], "use a multiple of 16384, for example 1015808"),
        (["--topology=v5e:2x2", "--tokens=1048576"], "GiB too few"),
    ],
)
def test_mistakes_are_one_sentence(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, *flags]) == 2
    assert says in capsys.readouterr().err
