"""The command line: what it offers, how fast it answers, how it fails."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

from hico_jax import __main__ as entry
from hico_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The surface users script against. Adding to it is an addition here; a change of what stands here breaks them.
SURFACE = {
    "demo": {"--out", "--train", "--quick", "--fresh", "--seed"},
    "ask": {
        "VIDEO", "QUESTION", "-q", "--question", "--model", "--json", "--max-frames", "--start", "--end", "--reader",
        "--drop", "--max-new-tokens", "--temperature", "--top-p", "--top-k", "--repetition-penalty", "--seed",
        "--quantize", "--dtype",
    },
    "train": set(),
    "eval": {
        "NAME", "--model", "--annotations", "--videos", "--subtitles", "--out", "--max-frames", "--limit", "--shard",
        "--drop", "--repetition-penalty", "--fresh",
    },
    "niah": {
        "--model", "--out", "--fresh", "--haystack", "--repeat", "--needles", "--images", "--hops", "--decoys",
        "--count", "--letters", "--seed", "--frames", "--depths", "--insertion", "--prompt", "--devices",
        "--controls", "--drop", "--think",
    },
    "compress": {
        "--model", "--out", "--methods", "--tokens-per-frame", "--max-frames", "--seed", "--fresh", "--films",
        "--seconds", "--benchmark", "--annotations", "--videos", "--subtitles", "--limit", "--schedule", "--pairs",
        "--chains",
    },
    "compare": {"DIR", "--json"},
    "bench": {"--model", "--out", "--frames", "--film", "--drop", "--max-tokens", "--timeout", "--fresh",
              "--quantize"},
    "serve": {
        "--model", "--name", "--host", "--port", "--host-name", "--lanes", "--piece", "--queue", "--drop",
        "--max-frames", "--max-new-tokens", "--quantize", "--dtype",
        "--no-warm", "--warm-all", "--allow-host", "--max-upload", "--max-seconds", "--max-source-frames",
        "--read-seconds", "--request-seconds", "--rate", "--connections", "--work",
    },
    "plan": set(),
    "world": {"--out", "--preset", "--seed", "--film", "--seconds", "--needle-at"},
    "convert": {
        "--allow-pickle", "--dtype", "--like", "--max-shard-bytes",
        "--overwrite", "--tokens-per-frame", "DST", "SRC",
    },
    "export": {"--dtype", "--max-shard-bytes", "--overwrite", "--part", "DST", "SRC"},
    "data": {
        "--beam", "--data-root", "--headers", "--json", "--max-frames", "--min-frames",
        "--model", "--out", "--sample", "--tokenizer", "FILE", "None",
    },
    "doctor": {"--json"},
    "models": {"--json"},
}  # fmt: skip

Reply = Callable[[object], object]


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def test_the_surface_is_what_it_was() -> None:
    found = {}
    for name, parser in subparsers().items():
        names = [n for a in parser._actions for n in a.option_strings or [str(a.metavar)]]
        found[name] = {n for n in names if n not in ("-h", "--help")}
    assert found == SURFACE


def test_every_target_exists() -> None:
    missing = [c.target for c in cli.COMMANDS.values() if not _exists(*c.target.split(":"))]
    assert missing == []


def _exists(module: str, function: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.is_file() and f"def {function}(" in file.read_text()


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in SURFACE), ["--version"], ["oops"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from hico_jax.cli import main; code = main(sys.argv[1:]);"
        "heavy = sorted({'jax', 'flax', 'numpy', 'av', 'absl', 'rich'} & set(sys.modules));"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "imported" not in done.stderr
    assert done.returncode == (cli.MISUSED if arguments == ["oops"] else cli.OK)


def test_help_answers_at_once() -> None:
    """About 0.1 s of a core, whatever else keeps the machine busy."""

    def once() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "hico_jax", "ask", "--help"], cwd=ROOT, capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(once() for _ in range(3)) < 0.5


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Reply], None]:
    """Put a function in the place of a sub-command's implementation."""

    def put(name: str, reply: Reply) -> None:
        module, function = cli.COMMANDS[name].target.split(":")
        stand_in = types.ModuleType(module)
        setattr(stand_in, function, reply)
        monkeypatch.setitem(sys.modules, module, stand_in)

    return put


def test_ask_hands_over_everything(target: Callable[[str, Reply], None]) -> None:
    seen: list[argparse.Namespace] = []
    target("ask", lambda args: seen.append(args))  # type: ignore[arg-type,func-returns-value]
    line = "ask v.mp4 one -q two --model m --max-frames 64 --start 1.5 --end 9 --seed 3 --json"
    line += " --drop uniform:4,18:1,0.5,0.25"
    assert cli.main(line.split()) == cli.OK
    (args,) = seen
    assert args.video == "v.mp4"
    assert args.questions == ["one", "two"]
    assert (args.model, args.max_frames, args.start, args.end) == ("m", 64, 1.5, 9.0)
    assert args.drop == ("uniform", (4, 18), (1.0, 0.5, 0.25))
    assert (args.seed, args.json, args.temperature, args.top_p, args.top_k) == (3, True, 0.0, 1.0, 0)


def test_train_gets_its_arguments_untouched(target: Callable[[str, Reply], None]) -> None:
    seen: list[object] = []
    target("train", lambda args: seen.append(args))  # type: ignore[func-returns-value]
    flags = ["--config", "configs/debug_tiny.py:x", "--config.workdir=w", "--helpfull"]
    assert cli.main(["train", *flags]) == cli.OK
    assert seen == [flags]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", "Did you mean `hico train`?"),
        ("zzz", "`hico --help` lists them"),
        ("ask", "required: VIDEO"),
        ("ask v.mp4", "no question was given"),
        ("ask v.mp4 hi --start 9 --end 3", "--end 3 is not after --start 9"),
        ("ask v.mp4 hi --drop half", "'half' does not read as KIND:LAYERS:RATIOS"),
        ("ask v.mp4 hi --drop uniform:a:1", "'uniform:a:1' does not read"),
        ("ask v.mp4 hi --top-p 2", "'2' is not a number above 0 and at most 1"),
        ("ask v.mp4 hi --max-frames 0", "'0' is not a whole number, 1 or more"),
        ("ask v.mp4 hi --max-f 4", "unrecognized arguments: --max-f 4"),
        ("demo --seed x", "'x' is not a whole number"),
        ("world --needle-at 3", "name the film with --film"),
        ("eval mvbench --model m --annotations a --shard 2/2", "'2/2' does not read as I/N"),
        ("eval mvbench --model m --annotations a --shard 0/2 --fresh", "--fresh would take away"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == cli.MISUSED
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def raises(error: BaseException) -> Reply:
    def reply(_: object) -> object:
        raise error

    return reply


@pytest.mark.parametrize("error", [ValueError("two\n  lines"), FileNotFoundError(2, "No such file", "v.mp4")])
def test_what_a_user_caused_has_no_traceback(
    error: Exception,
    target: Callable[[str, Reply], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target("doctor", raises(error))
    assert cli.main(["doctor"]) == cli.MISUSED
    err = capsys.readouterr().err
    assert err == f"hico doctor: {' '.join(str(error).split())}\n"

    monkeypatch.setenv("HICO_DEBUG", "1")
    assert cli.main(["doctor"]) == cli.MISUSED
    assert "Traceback" in capsys.readouterr().err


def test_what_we_caused_keeps_its_traceback(target: Callable[[str, Reply], None]) -> None:
    target("doctor", raises(AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["doctor"])


@pytest.mark.parametrize("name", SURFACE)
def test_every_command_says_how_to_go_on_after_ctrl_c(
    name: str, target: Callable[[str, Reply], None], capsys: pytest.CaptureFixture[str]
) -> None:
    target(name, raises(KeyboardInterrupt()))
    rest = {
        "convert": ["a", "b"], "export": ["a", "b"], "compare": ["a", "b"], "data": ["check", "f"],
        "ask": ["v", "hi"], "train": ["--config=c"], "plan": ["--config=c"],
        "eval": ["mvbench", "--model", "m", "--annotations", "a"],
        "niah": ["--model", "m"], "compress": ["--model", "m"], "bench": ["--model", "m"],
    }  # fmt: skip
    assert cli.main([name, *rest.get(name, [])]) == cli.INTERRUPTED
    err = capsys.readouterr().err.strip()
    assert err == f"hico {name}: stopped. {cli.COMMANDS[name].resume}"


def test_the_exit_code_of_the_work_is_passed_on(target: Callable[[str, Reply], None]) -> None:
    target("doctor", lambda _: 1)
    assert cli.main(["doctor"]) == cli.BROKEN


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no SIGPIPE on this system")
def test_a_closed_pipe_is_quiet(tmp_path: pathlib.Path) -> None:
    program = (
        "import sys, types; from hico_jax import cli; m = types.ModuleType('hico_jax.doctor');"
        "m.main = lambda args: [print('x' * 9999) for _ in range(999)] and None; sys.modules[m.__name__] = m;"
        "sys.exit(cli.main(['doctor']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=tmp_path
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == cli.PIPE_CLOSED
    assert said == b""


def test_exit_codes_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.OK
    text = capsys.readouterr().out
    codes = [cli.OK, cli.BROKEN, cli.MISUSED, cli.INTERRUPTED, cli.PIPE_CLOSED]
    assert [c for c in codes if f"\n  {c} " not in text] == []


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc reads GLIBC_TUNABLES")
@pytest.mark.parametrize(("command", "tuned", "again"), [("train", None, 1), ("train", "", 0), ("models", None, 0)])
def test_what_trains_starts_over_once_with_larger_pages(
    command: str, tuned: str | None, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(sys, "argv", ["hico", command])
    monkeypatch.setattr(os, "execve", lambda _path, _argv, environment: started.append(environment))
    monkeypatch.setattr(entry, "main", lambda: 0)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if tuned is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tuned)
    assert entry.run() == 0
    assert [e["GLIBC_TUNABLES"] for e in started] == [entry.HUGE_PAGES] * again


def test_reading_processes_do_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []

    class Child:
        def __init__(self, name: str) -> None:
            self.name = name

        def kill(self) -> None:
            killed.append(self.name)

    children = [Child("grain-process-prefetch-1"), Child("mine")]
    left: list[int] = []
    monkeypatch.setattr(sys, "argv", ["hico", "train"])
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(entry, "main", lambda: 75)
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(multiprocessing, "active_children", lambda: children)
    entry.run()
    assert killed == ["grain-process-prefetch-1"]
    assert left == [75]
    children.pop(0)
    assert entry.run() == 75
    assert left == [75]
