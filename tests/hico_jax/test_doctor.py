from __future__ import annotations

import argparse
import importlib.metadata
import json

import pytest

from hico_jax import doctor


def test_this_machine_is_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(argparse.Namespace(json=False)) == 0
    text = capsys.readouterr().out
    assert [name for name in (*doctor.PACKAGES, *doctor.DECODERS) if name not in text] == []
    assert "8 of 8 frames in H.264" in text
    assert "Fit to run" in text


def test_json_holds_the_same_checks(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(argparse.Namespace(json=True))
    checks = json.loads(capsys.readouterr().out)
    assert {c["group"] for c in checks} == set(doctor.GROUPS)
    assert {c["state"] for c in checks} <= {doctor.GOOD, doctor.NOTE}


def test_a_missing_package_is_broken_and_has_a_fix() -> None:
    def installed(name: str) -> str:
        if name in ("av", "libtpu"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    checks = list(doctor.versions(installed))
    (av,) = [c for c in checks if c.name == "av"]
    assert (av.state, av.found) == (doctor.BAD, "not installed")
    assert "requirements.txt" in av.fix
    assert not [c for c in checks if c.name == "libtpu"]  # optional


@pytest.mark.parametrize(
    ("found", "python", "names"),
    [
        ({"jax": "0.11.0", "jaxlib": "0.10.2"}, (3, 12), ["jax and jaxlib"]),
        ({"jax": "0.10.2", "jaxlib": "0.10.1"}, (3, 11), []),
        ({"libtpu": "0.0.52", "jax-cuda12-plugin": "0.10.2"}, (3, 11), ["accelerators"]),
        ({}, (3, 10), ["python"]),
    ],
)
def test_known_problems(found: dict[str, str], python: tuple[int, int], names: list[str]) -> None:
    checks = list(doctor.problems(found, python))
    assert [c.name for c in checks] == names
    assert all(c.fix and c.state != doctor.GOOD for c in checks)


def test_a_check_that_fails_is_a_finding_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_jax() -> doctor.Iterator[doctor.Check]:
        raise ImportError("libfoo.so is missing")

    monkeypatch.setitem(doctor.GROUPS, "devices", no_jax)
    assert doctor.main(argparse.Namespace(json=False)) == 1
    text = capsys.readouterr().out
    assert " X devices" in text
    assert "ImportError: libfoo.so is missing" in text
    assert text.rstrip().endswith("Broken: devices")
