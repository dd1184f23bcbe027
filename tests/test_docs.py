"""What the documentation prints exists: commands with their flags, configurations, tests, scripts, and linked files."""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex
from collections.abc import Iterator

import pytest

from hico_jax import cli, config
from hico_jax.plan import run as plan

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for part in ("README.md", "docs/*.md", "launch/**/*.md", "hico_jax/**/*.md", "data_pipeline/*.md")
    for page in ROOT.glob(part)
)
PROGRAM = re.compile(r"(?:^|[\s=])(?:\.venv/bin/)?(hico|pytest|python3?|bash)\s+(.*)")


def commands(text: str) -> Iterator[tuple[int, bool, str]]:
    """Line number, whether it stands in a block of code, and the command, with the lines that continue it."""
    fenced, lines = False, text.splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            last = number
            while line.endswith("\\") and last < len(lines):
                line, last = f"{line[:-1]} {lines[last]}", last + 1
            yield number, True, line
        else:
            yield from ((number, False, span) for span in re.findall(r"`([^`]+)`", line))


def found(program: str) -> list[tuple[str, bool, str]]:
    """Where, whether in a block of code, and what follows the program's name."""
    out = []
    for page in PAGES:
        for number, block, line in commands(page.read_text(encoding="utf-8")):
            match = PROGRAM.search(line)
            if match and match[1].startswith(program):
                rest = match[2].split(" & done")[0].replace("$i", "0")
                out.append((f"{page.relative_to(ROOT)}:{number}", block, rest))
    return out


def parsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def passed_through(name: str, words: list[str]) -> None:
    """`hico train` and `hico plan` check their own flags; without a configuration there is nothing more to check."""
    own, rest = (
        plan._flags(words) if name == "plan" else ({}, [w for w in words if w not in ("--dry_run", "--compile_only")])
    )
    assert not rest or own.get("table") or config.from_flags(rest).model_name


def test_every_command_of_ours_parses(capsys: pytest.CaptureFixture[str]) -> None:
    known, seen, wrong = parsers(), 0, []
    for where, block, text in found("hico"):
        words = shlex.split(text, comments=True)
        name, flags = words[0], {w.split("=")[0] for w in words if w.startswith("--")}
        if name == "--help":
            continue
        seen += 1
        partial = "..." in text or not block or any(re.fullmatch(r"--config=FILE.*", w) for w in words)
        try:
            if name not in known:
                raise ValueError(f"there is no command {name}")
            if cli.COMMANDS[name].options is None:
                passed_through(name, [] if partial else words[1:])
            elif partial:
                assert flags <= {s for a in known[name]._actions for s in a.option_strings}
            else:
                cli.make_parser().parse_args(words)
        except (ValueError, AssertionError, SystemExit) as error:
            wrong.append(f"{where}: hico {text}: {error} {capsys.readouterr().err}")
    assert wrong == []
    assert seen > 50


def test_scripts_and_benchmarks_exist_and_know_their_flags() -> None:
    seen, wrong = 0, []
    for where, _, text in [*found("python"), *found("bash")]:
        words = shlex.split(text, comments=True)
        if not words or words[0].startswith("-c"):
            continue
        path = ROOT / (words[1].replace(".", "/") + "/__main__.py" if words[0] == "-m" else words[0])
        seen += 1
        if not path.is_file():
            wrong.append(f"{where}: there is no {path.relative_to(ROOT)}")
        elif path.suffix == ".py":
            source = path.read_text(encoding="utf-8")
            lost = [w for w in words if w.startswith("--") and f'"{w.split("=")[0]}"' not in source]
            wrong += [f"{where}: {path.name} has no {flag}" for flag in lost]
    assert wrong == []
    assert seen > 20


def test_tests_that_are_named_exist() -> None:
    seen, wrong = 0, []
    for where, _, text in found("pytest"):
        words = shlex.split(text, comments=True)
        paths = [ROOT / w for w in words if w.startswith("tests/")]
        wrong += [f"{where}: there is no {path.relative_to(ROOT)}" for path in paths if not path.exists()]
        if not paths or wrong:
            continue
        seen += 1
        files = [f for path in paths for f in ([path] if path.is_file() else path.rglob("test_*.py"))]
        source = "\n".join(f.read_text(encoding="utf-8") for f in files)
        names = " ".join(re.findall(r"def test_\w+", source)) + " ".join(f.stem for f in files)
        chosen = words[words.index("-k") + 1] if "-k" in words else ""
        lost = [w for w in re.findall(r"\w+", chosen) if w not in ("and", "or", "not") and w not in names + source]
        wrong += [f"{where}: no test there is called {word}" for word in lost]
    assert wrong == []
    assert seen > 10


def test_links_lead_somewhere() -> None:
    wrong = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path = target.split("#")[0]
            if path and "://" not in path and not (page.parent / path).exists():
                wrong.append(f"{page.relative_to(ROOT)} links to {target}")
    assert wrong == []
