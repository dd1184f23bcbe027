from __future__ import annotations

import argparse
import json

import pytest

from hico_jax import catalog, registry


def test_every_model_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    catalog.main(argparse.Namespace(json=True))
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(registry.MODELS)
    released = {row["name"]: row for row in rows if row["source"]}
    assert released
    assert all(row["licence"] and row["parameters"] > 1e9 for row in released.values())
    assert {name: row["tokens/frame"] for name, row in released.items() if row["tokens/frame"] != 16} == {
        "internvl_hico_r64": 64
    }


def test_what_ships_is_named_below_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "table", lambda rows: "the table")
    monkeypatch.setattr(catalog.registry, "MODELS", {})
    for there, said in ((True, "the table\n\nTrained weights that ship, for --model: nano.\n"), (False, "the table\n")):
        monkeypatch.setattr(catalog.weights, "shipped", lambda name, there=there: there)
        catalog.main(argparse.Namespace(json=False))
        assert capsys.readouterr().out == said


def test_the_table_lines_up() -> None:
    head = {"name": "short", "px": 64, "parameters": 1_184_000, "context": 8192, "source": "", "note": "small"}
    rows = [head, {**head, "name": "a_longer_name", "parameters": 7_920_000_000, "source": "a/b", "note": "big"}]
    lines = catalog.table(rows).splitlines()
    assert lines == [
        "name           px  parameters  context  source",
        "short          64      1.18 M    8,192  -",
        "a_longer_name  64      7.92 B    8,192  a/b",
        "",
        "short          small",
        "a_longer_name  big",
    ]
