"""`hico ask` end to end on a tiny model: answers, where weights come from, and every bad input in one line."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline import video
from data_pipeline.frames import Sampling
from data_pipeline.options import DataConfig
from data_pipeline.tokenizer import Tokenizer, load_tokenizer
from hico_jax import api, ask, checkpoint, cli, config
from hico_jax.batch import DropSchedule
from hico_jax.config import CheckpointConfig, Experiment
from hico_jax.convert import export
from hico_jax.generate import GenerationConfig
from hico_jax.kernels.packed import Packed
from hico_jax.models.hico import HiCo
from hico_jax.parallel.mesh import MeshConfig, make_mesh

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def exported(asked_model: HiCo, words: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model")
    file = words.save(folder / "tokenizer")  # type: ignore[attr-defined]
    return export.export(asked_model, folder / "weights", files=[file])


@pytest.fixture
def run(exported: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """The command with a model: exit code, stdout, stderr."""

    def ask_it(path: Any, *options: str) -> tuple[int, str, str]:
        line = ["ask", str(path), "What is seen?", "--model", str(exported), "--max-new-tokens", "3", *options]
        code = cli.main(line)
        return (code, *capsys.readouterr())

    return ask_it


def same(a: HiCo, b: HiCo) -> None:
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_answer(run: Ask, noise_film: pathlib.Path) -> None:
    code, out, err = run(noise_film, "--max-frames", "8", "-q", "Which colour?")
    assert code == cli.OK
    assert out.startswith("Q: What is seen?\nA: ")
    assert out.count("\nQ: Which colour?\nA: ") == 1
    assert f"watching {noise_film}" in err
    assert "8 frames of 12 s; 8 visual tokens; load" in err


def test_an_answer_as_json_and_with_a_drop(run: Ask, noise_film: pathlib.Path) -> None:
    code, out, err = run(noise_film, "--max-frames", "8", "--json", "--drop", "uniform:1:1,0.5")
    assert (code, err) == (cli.OK, "")
    found = json.loads(out)
    (answer,) = found["answers"]
    assert answer["question"] == "What is seen?"
    assert (answer["frames"], answer["visual_tokens"], answer["kept"]) == (8, 8, [4])
    assert run(noise_film, "--max-frames", "8", "--json", "--drop", "uniform:9:1,0.5")[0] == cli.MISUSED


def test_8_bits_answer_through_the_command_and_from_python(
    run: Ask, exported: pathlib.Path, noise_film: pathlib.Path
) -> None:
    options = ("--max-frames", "8", "--json", "--drop", "uniform:1:1,0.5", "--quantize", "int8")
    code, out, _ = run(noise_film, *options)
    assert code == cli.OK
    loaded = api.load(exported, quantize="int8")
    assert isinstance(loaded.hico.llm.blocks.mlp.down.get_value(), Packed)
    packed = ask.with_drop(loaded.hico, DropSchedule("uniform", (1,), (1.0, 0.5)))  # under another schedule
    model = api.Model(packed, exported, eos=loaded.eos)
    settings = GenerationConfig(max_new_tokens=3, eos=model.tokenizer.eos_ids)
    answer = model.ask(model.watch(noise_film, max_frames=8), "What is seen?", settings=settings)
    assert json.loads(out)["answers"][0]["answer"] == answer.text
    with pytest.raises(ValueError, match="quantize is 'int3'; it must be one of int8"):
        api.load(exported, quantize="int3")
    with pytest.raises(ValueError, match="leave out the mesh"):
        api.load(exported, quantize="int8", mesh=make_mesh(MeshConfig()))


def test_fewer_frames_than_a_clip(run: Ask, tmp_path: pathlib.Path) -> None:
    """The last frame is shown again."""
    path = video.write_video(tmp_path / "short.mp4", np.full((3, 32, 32, 3), 90, np.uint8), 1.0)
    code, out, _ = run(path, "--max-frames", "4", "--json")
    assert code == cli.OK
    assert json.loads(out)["answers"][0]["frames"] == 4


def silence(path: pathlib.Path) -> None:
    """A film without pictures."""
    with av.open(str(path), "w", format="mp4") as made:
        stream = made.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        made.mux(stream.encode(sound))
        made.mux(stream.encode())


BAD = {
    "missing.mp4": (lambda path: None, "there is no such file"),
    "folder": (lambda path: path.mkdir(), "holds no .jpg"),
    "text.mp4": (lambda path: path.write_text("hello"), "this is a text file"),
    "list.mp4": (lambda path: path.write_text("#EXTM3U\n#EXTINF:2,\nfilm.mp4\n#EXT-X-ENDLIST\n"), "a playlist"),
    "audio.mp4": (silence, "no video"),
    "empty.mp4": (lambda path: path.write_bytes(b""), "the file is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_line_and_exit_code_2(run: Ask, tmp_path: pathlib.Path, noise_film: Any, name: str) -> None:
    shutil.copyfile(noise_film, tmp_path / "film.mp4")  # what the list names: it must not be read
    make, words = BAD[name]
    make(tmp_path / name)
    code, out, err = run(tmp_path / name, "--json")
    assert (code, out) == (cli.MISUSED, "")
    assert err.startswith("hico ask: ")
    assert err.count("\n") == 1
    assert words in err
    assert name in err


def test_settings_that_do_not_fit(run: Ask, noise_film: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for options, words in (
        (["--max-frames", "3"], "--max-frames 3 is less than one clip of 4 frames"),
        (["--start", "50", "--end", "60"], "holds no frame"),
        (["--reader", "vlc"], "video_read_type is 'vlc'"),
        (["--model", str(tmp_path)], "holds no config.json"),
    ):
        code, out, err = run(noise_film, "--json", *options)
        assert (code, out, err.count("\n")) == (cli.MISUSED, "", 1)
        assert words in err


def test_no_model_at_all(noise_film: Any, tmp_path: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ask", str(noise_film), "hi"]) == cli.MISUSED
    err = capsys.readouterr().err
    assert "make one with `hico demo --train`" in err
    assert err.count("\n") == 1


def test_exported_weights_are_the_model(exported: pathlib.Path, asked_model: HiCo, words: Tokenizer) -> None:
    model, folder = ask.load_model(exported)
    same(model, asked_model)
    assert load_tokenizer(folder).encode("What is seen?") == words.encode("What is seen?")


def test_the_workdir_of_a_run_is_a_model(asked_model: HiCo, words: Tokenizer, tmp_path: pathlib.Path) -> None:
    words.save(tmp_path / "tokenizer")  # type: ignore[attr-defined]
    data = DataConfig(tokenizer=str(tmp_path / "tokenizer"))
    experiment = Experiment("test", "tiny", asked_model.config, data, workdir=str(tmp_path))
    (tmp_path / "config.json").write_text(config.to_json(experiment))
    with pytest.raises(ValueError, match="holds no checkpoint"):
        ask.load_model(tmp_path)
    saved = checkpoint.Checkpointer(str(tmp_path), CheckpointConfig())
    saved.save(3, checkpoint.to_dict(nnx.state(asked_model)), {"count": jnp.zeros(())}, {"data": {}, "config": {}})
    saved.close()
    model, folder = ask.load_model(tmp_path)
    assert model.config == asked_model.config
    same(model, asked_model)
    assert load_tokenizer(folder).vocab_size == words.vocab_size


def test_the_type_where_none_is_named(
    asked_model: HiCo, words: Tokenizer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = ask.with_config(
        jax.tree.map(lambda p: p.astype("bfloat16"), asked_model),
        dataclasses.replace(asked_model.config, dtype="bfloat16"),
    )
    export.export(half, tmp_path / "half")

    def types(dtype: str | None = None) -> set[str]:
        model, _ = ask.load_model(tmp_path / "half", dtype)
        return {model.config.dtype, *(p.dtype.name for p in jax.tree.leaves(model))}

    assert types() == {"float32"}
    assert types("bfloat16") == {"bfloat16"}
    monkeypatch.setattr("os.sysconf", lambda _: 1)  # a machine without memory
    assert types() == {"bfloat16"}
    monkeypatch.undo()
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert ask.usual_dtype(1) is None


def test_another_schedule_keeps_the_weights(asked_model: HiCo) -> None:
    schedule = DropSchedule("uniform", (1,), (1.0, 0.5))
    dropping = ask.with_drop(asked_model, schedule)
    assert dropping.config.drop == schedule
    assert asked_model.config.drop == DropSchedule()
    same(dropping, asked_model)


def test_limits_are_rounded_to_whole_clips(asked_model: HiCo) -> None:
    found = ask.whole_clips(Sampling("dynamic_fps1", 6, 15, 8), asked_model)
    assert (found.min_frames, found.max_frames) == (4, 12)
    assert ask.whole_clips(Sampling("dynamic_fps1", 64, 0, 8), asked_model).max_frames == 0
    with pytest.raises(ValueError, match="less than one clip of 4 frames"):
        ask.whole_clips(Sampling("dynamic_fps1", 2, 3, 8), asked_model)
