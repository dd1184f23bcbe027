"""Reading where the TPU compiler placed buffers, before it writes code."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from typing import Any

import pytest

from configs import stage3_sft
from hico_jax import config
from hico_jax.parallel.mesh import MeshConfig, make_mesh
from hico_jax.plan import buffers
from hico_jax.plan import compile as c

REPORT = """Memory Space: default (color=0)
Total bytes: 4294967296 (4.00GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
Memory Space: vmem (color=1)
Total bytes: 100479488 (95.82MiB)
Memory Space: host (color=4)
Total bytes: 1073741824 (1.00GiB)
"""
BUFFERS = """BufferAssignment:
allocation 0: size 4, color 8, page 0, thread-local:
allocation 6: size 1073741824, page 0, parameter 117, shape |u8[16,128,4,224,224,3]| at ShapeIndex {}:
 value: <8 param @0> (size=1073741824,offset=0): u8[16,128,4,224,224,3]
allocation 7: size 536870912, page 0, parameter 10, shape |f32[28,224,18944]| at ShapeIndex {}, maybe-live-out:
allocation 8: size 536870912, color 4, page 0, parameter 11, shape |f32[28,224,18944]| at ShapeIndex {}:
allocation 9: size 2684354560, page 0, preallocated-temp:
"""
PROGRAM = """HloModule jit_train_step
ENTRY %main (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%p), dimensions={0}
}
"""
WRITES = """
import pathlib, tempfile, time
folder = pathlib.Path(tempfile.gettempdir(), "hico_plan_x")
folder.mkdir()
for end, text in {files!r}.items():
    (folder / f"module_0000.jit_train_step.cl_1.after_optimizations{{end}}").write_text(text)
time.sleep({sleeps})
"""
FILES = {
    "-memory-usage-report.txt": REPORT, "-buffer-assignment.txt": BUFFERS, "_after_buffer_assignment.txt": PROGRAM,
}  # fmt: skip


def test_a_record() -> None:
    assert buffers.read(REPORT, BUFFERS, PROGRAM) == {
        "peak_gib": 4.0, "argument_gib": 1.5, "temporary_gib": 2.5, "host_gib": 1.0,
        "collectives": {"all-gather": [1, 128]},
    }  # fmt: skip


def test_the_compiler_is_ended_when_its_report_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "CHILD", WRITES.format(files=FILES, sleeps=600))
    monkeypatch.setattr(buffers, "STILL_S", 0.0)
    found = buffers.of_row("a row")
    assert found["peak_gib"] == 4.0
    assert found["code"] is False
    assert found["compile_s"] < 60


def test_a_compiler_that_fails_or_never_comes_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "CHILD", "raise ValueError('no such slice')")
    with pytest.raises(ValueError, match=r"left no report of 'a row': ValueError: no such slice"):
        buffers.of_row("a row")
    part = {"-buffer-assignment.txt": BUFFERS}
    monkeypatch.setattr(buffers, "CHILD", WRITES.format(files=part, sleeps=600))
    with pytest.raises(ValueError, match=r"placed no buffers of 'a row' within 0 s"):
        buffers.of_row("a row", limit_s=0.0)


@pytest.mark.tpu
@pytest.mark.timeout(1800)
def test_what_is_placed_is_what_a_compile_to_the_end_sets_aside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    """Of nano on four chips: arguments, temporary memory and collectives of both are the same."""
    pytest.importorskip("libtpu")
    experiment = config.freeze(stage3_sft.get_config("nano"))
    devices, sizes, placed = c.devices_of("v5e:2x2"), MeshConfig(1, 4, 1, 1), []
    experiment = dataclasses.replace(experiment, mesh=sizes, data=dataclasses.replace(experiment.data, batch_size=4))
    plain = c._program

    def program_of(compiled: Any, folder: str) -> str:
        placed.append(buffers._reports(pathlib.Path(folder).parent))
        return plain(compiled, folder)

    monkeypatch.setattr(buffers, "STILL_S", 0.0)
    monkeypatch.setattr(c, "_program", program_of)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    final = c.train_step(experiment, make_mesh(sizes, devices), rows=4, tokens=4096, clips=16)
    (reports,) = placed
    total, arguments, host = buffers.sizes(*reports[:2])
    assert arguments == final.argument_bytes
    assert total - arguments == pytest.approx(final.temporary_bytes, rel=0.02)
    assert host == pytest.approx(final.host_bytes, abs=2**16)
    assert buffers.read(*reports)["collectives"] == c.record(final)["collectives"]
