"""Reading what a compiler says; and, with the TPU compiler, what it says of a million tokens."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import pytest
from jax.experimental import topologies

from hico_jax.parallel.mesh import MeshConfig, make_mesh
from hico_jax.plan import buffers, program, table
from hico_jax.plan import compile as c
from hico_jax.plan.program import COLLECTIVES


def test_an_unknown_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # somebody may be compiling
    with pytest.raises(ValueError, match="does not know the topology 'v5p:9x9x9'"):
        c.devices_of("v5p:9x9x9")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("ABORTED: Internal error when accessing libtpu multi-process lockfile.", "delete /tmp/libtpu_lockfile"),
        ("Library libtpu.so not found", r"pip install -e '\.\[tpu-compile\]'"),
        ("no such slice", r"does not know the topology 'v5e:2x2' \(no such slice\)"),
    ],
)
def test_what_the_compiler_complains_of(words: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    with pytest.raises(ValueError, match=says):
        c.devices_of("v5e:2x2")


@functools.cache
def million(topology: str, tokens: int, keeps: str) -> tuple[table.Row, c.Compiled]:
    row = table.long_row(topology, tokens, keeps)
    mesh = make_mesh(row.mesh, c.devices_of(topology))
    shape = row.shape
    return row, c.train_step(row.experiment, mesh, rows=shape.rows, tokens=shape.tokens, clips=shape.clips)


@pytest.mark.tpu
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("topology", "tokens", "keeps", "most"),
    [
        ("v5p:4x4x4", 1 << 20, "nothing", 9.5),
        ("v5p:4x4x4", 1 << 20, "attention", 13.0),
        ("v6e:4x4", 1 << 20, "nothing", 31.0),
        ("v5p:4x4x4", 1 << 22, "nothing", 60.0),
        ("v5p:4x8x8", 10 << 20, "nothing", 60.0),
    ],
)
def test_full_fine_tuning_of_a_long_row_fits_as_forecast(topology: str, tokens: int, keeps: str, most: float) -> None:
    pytest.importorskip("libtpu")
    row, found = million(topology, tokens, keeps)
    assert found.peak_bytes <= most * 2**30, c.gib(found.peak_bytes)
    assert row.forecast().peak == pytest.approx(found.peak_bytes, rel=0.05)


@pytest.mark.tpu
@pytest.mark.timeout(1800)
def test_what_layers_keep_can_wait_on_the_host() -> None:
    """`remat_keeps=offload` is a real program for a TPU: some of what a step needs lies in the host's memory."""
    pytest.importorskip("libtpu")
    from configs import stage3_sft
    from hico_jax import config

    experiment = config.freeze(stage3_sft.get_config("nano"))
    devices = c.devices_of("v5e:2x2")
    sizes, found = MeshConfig(1, len(devices), 1, 1), {}
    for keeps in ("attention", "offload"):
        llm = dataclasses.replace(experiment.model.llm, remat=True, remat_keeps=keeps)
        model = dataclasses.replace(experiment.model, dtype="bfloat16", llm=llm)
        settings = dataclasses.replace(
            experiment, model=model, mesh=sizes, data=dataclasses.replace(experiment.data, batch_size=4)
        )
        found[keeps] = c.train_step(settings, make_mesh(sizes, devices), rows=4, tokens=4096, clips=0)
    llm = experiment.model.llm
    kept = llm.num_layers * 4096 * llm.num_heads * llm.head_dim * 2  # the attention's output of one row, in bfloat16
    assert found["attention"].host_bytes == 0
    assert found["offload"].host_bytes >= kept


@pytest.mark.tpu
@pytest.mark.timeout(7200)
def test_what_a_million_tokens_send() -> None:
    """28 layers of 63 hops, forward, again and backward; the film once there and once back; no key is gathered."""
    pytest.importorskip("libtpu")
    text = buffers.reports(table.long_row("v5p:4x4x4", 1 << 20, "nothing").key)[2]  # code is not needed for this
    sent = {(s.kind, s.shape): s for s in program.collectives_of(text)}
    hops, layers = 63, 28
    assert sent["collective-permute", "bf16[1,16384,4,128]"].times == layers * hops * 2 * 3  # keys and values
    assert sent["collective-permute", "f32[1,16384,4,128]"].times == layers * hops * 2  # their gradients
    film = sent["collective-permute", "bf16[1,16320,3584]"]
    assert (film.times, film.size) == (2 * hops, 16_320 * 3584 * 2)
    wide = [s for kind, s in sent if kind in ("all-gather", "all-to-all", "all-reduce") and "1048576,4,128" in s]
    assert wide == []
    inside = program.within(text, "clips")
    assert inside
    assert not {"sort", "scatter", "gather", *COLLECTIVES} & set(inside), inside


def test_a_program_comes_from_the_compilers_file_else_from_jaxlib_else_not(tmp_path: pathlib.Path) -> None:
    class Made:
        def as_text(self) -> str:
            return "of jaxlib"

    assert c._program(Made(), str(tmp_path)) == "of jaxlib"
    assert c._program(None, str(tmp_path)) == ""
    (tmp_path / "module_0007.jit_train_step.cl_1.after_optimizations.txt").write_text("of the compiler")
    (tmp_path / "module_0007.jit_train_step.cl_1.after_codegen.txt").write_text("another")
    assert c._program(Made(), str(tmp_path)) == "of the compiler"
