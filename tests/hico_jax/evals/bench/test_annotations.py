"""Reading annotation files; what records must hold is tested with the benchmarks that ask for it."""

from __future__ import annotations

import pathlib

import pytest

from hico_jax.evals.bench import annotations


def test_the_same_records_from_every_format(tmp_path: pathlib.Path) -> None:
    from pyarrow import Table, parquet

    records = [{"a": 1, "b": ["x", "y"]}, {"a": 2, "b": ["z"]}]
    parquet.write_table(Table.from_pylist(records), tmp_path / "r.parquet")
    (tmp_path / "r.json").write_text('[{"a": 1, "b": ["x", "y"]}, {"a": 2, "b": ["z"]}]')
    (tmp_path / "r.jsonl").write_text('{"a": 1, "b": ["x", "y"]}\n{"a": 2, "b": ["z"]}\n')
    for suffix in ("parquet", "json", "jsonl"):
        assert annotations.load(tmp_path / f"r.{suffix}") == records


def test_only_a_newline_ends_a_record(tmp_path: pathlib.Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"a": "one\u2028two\x85three"}\n\n{"a": "x"}\r\n', "utf-8")
    assert annotations.load(tmp_path / "r.jsonl") == [{"a": "one\u2028two\x85three"}, {"a": "x"}]


def test_what_is_no_annotation_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "r.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "r.txt").write_text("[]")
    with pytest.raises(ValueError, match="not readable as parquet"):
        annotations.load(tmp_path / "r.parquet")
    with pytest.raises(ValueError, match=r"read from \.json"):
        annotations.load(tmp_path / "r.txt")
    for content, told in (("[]", "list of 0"), ('{"a": 1}', "dict of 1"), ("5", "int"), ("null", "NoneType")):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(ValueError, match=f"holds {told}; a list of questions was expected"):
            annotations.load(tmp_path / "r.json")
    with pytest.raises(ValueError, match="no such annotation file"):
        annotations.load(tmp_path / "gone.json")


def test_files_are_found_where_they_are_published(tmp_path: pathlib.Path) -> None:
    for name in ("json/a.json", "b_2.jsonl", "b_1.jsonl", "other.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = annotations.locate(tmp_path, ["a", "b_*"])
    assert [p.name for p in found] == ["a.json", "b_1.jsonl", "b_2.jsonl"]
    assert annotations.locate(tmp_path / "other.json", ["a"]) == [tmp_path / "other.json"]
