"""The tables, and the page they stand in."""

from __future__ import annotations

import json
import pathlib

import pytest

from hico_jax.plan import table
from hico_jax.plan.forecast import USABLE


def test_every_row_has_a_line_and_what_was_compiled_is_shown(tmp_path: pathlib.Path) -> None:
    records = tmp_path / "records.json"
    row = table.long_row(*table.LONG[0])
    records.write_text(json.dumps({row.key: {"peak_gib": 7.25}}))
    lines = table.markdown(records).splitlines()
    stages = len(table.SLICES) * sum(len(models) for _, models in table.STAGES.values())
    assert len(lines) == 5 + len(table.LONG) + stages
    assert all(line.count("|") == lines[0].count("|") for line in lines if line)
    assert "| 7.2 | 95 |" in lines[2]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.write(page, records)
    assert page.read_text() == f"before\n{table.BEGIN}\n\n{chr(10).join(lines)}\n\n{table.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="the tables go between them"):
        table.write(page, records)


def test_only_rows_without_a_record_are_compiled(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, seen = tmp_path / "records.json", []

    def compiled(row: table.Row) -> dict[str, float]:
        seen.append(row.key)
        return {"peak_gib": 1.0, "compile_s": 0.0}

    monkeypatch.setattr(table, "compiled", compiled)
    table.compile_all(records, only="one row | umt_qwen2_7b | v5p")
    assert len(seen) == 4
    table.compile_all(records, only="one row | umt_qwen2_7b | v")
    assert len(seen) == 5
    table.compile_all(records, only="one row | umt_qwen2_7b | v6e:4x4 | 1 x 16", again=True)
    assert len(seen) == 6
    assert set(table.records(records)) == set(seen)


def test_every_stage_of_every_model_fits_the_slices_recommended_for_it() -> None:
    """By forecast, and by the compiler where it was asked."""
    known, every = table.records(), [row for row in table.rows() if row.name in table.STAGES]
    fits = lambda row: row.forecast().peak <= row.topology.chip.memory * USABLE
    marked = {(row.name, row.experiment.model_name, row.topology.name): row for row in every if row.marked}
    for stage, (_, models) in table.STAGES.items():
        for model in models:
            assert {name.split(":")[0] for name in table.recommended(model)} == {"v5p", "v6e"}
            for name in table.recommended(model):
                row = marked.pop((stage, model, name))
                assert fits(row), row.key
                if row.key in known:
                    assert known[row.key]["peak_gib"] * 2**30 <= row.topology.chip.memory * USABLE, row.key
    assert not marked
    smaller = table.find("internvl_hico_r16 | v6e:4x4")
    assert not fits(smaller), "of v6e the InternVL models need no more than the others"
