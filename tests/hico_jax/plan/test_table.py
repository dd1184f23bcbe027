from __future__ import annotations

from hico_jax.plan import table


def test_every_stage_has_lines() -> None:
    lines = table.markdown().splitlines()
    assert len(lines) == 2 + len(table.SLICES) * sum(len(models) for _, models in table.STAGES.values())
    assert all(line.count("|") == lines[0].count("|") for line in lines)
