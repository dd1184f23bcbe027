"""The command's own decisions: who may reach it, by which names, with which lanes."""

from __future__ import annotations

import argparse
import pathlib
import socket
from collections.abc import Callable

import pytest

from hico_jax import cli
from hico_jax.api import Model
from hico_jax.options import parse_lanes
from hico_jax.serve import command
from hico_jax.serve.decoder import Decoder


def test_others_are_let_in_only_with_a_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HICO_API_KEY", raising=False)
    assert cli.main(["serve", "--host", "0.0.0.0"]) == cli.MISUSED
    assert "a key is needed: set HICO_API_KEY" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.api, "load", lambda *a, **k: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--model", "nano", "--port", str(port)]) == cli.MISUSED
    assert f"could not listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert cli.main(["serve", "--model", "nano", "--host", "no.such.name.invalid", "--port", "0"]) == cli.MISUSED


def test_a_model_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["serve"]) == cli.MISUSED
    assert "there is none in runs/demo/model" in capsys.readouterr().err


def test_names_it_answers_to() -> None:
    assert command.names("127.0.0.1", []) == ("127.0.0.1", "localhost", "[::1]", "127.0.0.1")
    assert command.names("0.0.0.0", []) == ()
    assert command.names("::", ["films.example"]) == ("films.example",)


def test_lanes_reach_the_longest_row(make_model: Callable[..., Model]) -> None:
    assert command.lanes(make_model()) == ((2, 512),)
    assert parse_lanes("8x2048,1x32768") == ((8, 2048), (1, 32768))
    for wrong in ("8", "0x64", "2x10", "ax64", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="does not read as NxTOKENS"):
            parse_lanes(wrong)


def test_what_readers_can_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder()
    monkeypatch.setattr(decoder, "confinement", lambda: ("one", "two"))
    assert command.confinement(decoder) == "people's files are read without a network (one, two)"
    monkeypatch.setattr(decoder, "confinement", tuple)
    assert command.confinement(decoder).startswith("warning: this system does not keep")
