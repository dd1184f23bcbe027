"""Reading what a compiler says; and, with the TPU compiler, what it says of a million tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hico_jax.parallel.mesh import MeshConfig, make_mesh
from hico_jax.plan import compile as c


def test_collectives_are_counted() -> None:
    text = """
      %a = f32[8,4]{1,0} all-gather(%x), dimensions={0}
      %b = (bf16[2,2]{1,0}, bf16[4,2]{1,0}) all-gather-start(%y)
      %c = bf16[16]{0} collective-permute(%z)
      %d = f32[2]{0} add(%p, %q)
    """
    assert c.count(text) == {"all-gather": (2, 128 + 16), "collective-permute": (1, 32)}


def test_an_unknown_topology() -> None:
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="does not know the topology 'v5p:9x9x9'"):
        c.devices_of("v5p:9x9x9")


def million(topology: str, tokens: int, keeps: str, **mesh: Any) -> c.Compiled:
    from configs import stage3_sft
    from hico_jax import config

    experiment = config.freeze(stage3_sft.get_config("umt_qwen2_7b"))
    model = dataclasses.replace(
        experiment.model, max_length=tokens, llm=dataclasses.replace(experiment.model.llm, remat_keeps=keeps)
    )
    devices = c.devices_of(topology)
    sizes = MeshConfig(1, 1, len(devices), 1, context="ring", **mesh)
    experiment = dataclasses.replace(
        experiment, model=model, mesh=sizes, optim=dataclasses.replace(experiment.optim, accumulate=1),
        data=dataclasses.replace(experiment.data, batch_size=1),
    )  # fmt: skip
    clips = (tokens - 4096) // 64 // len(devices) * len(devices)
    return c.train_step(experiment, make_mesh(sizes, devices), rows=1, tokens=tokens, clips=clips)


@pytest.mark.tpu
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("topology", "tokens", "keeps", "most"),
    [
        ("v5p:4x4x4", 1 << 20, "nothing", 9.5),
        ("v5p:4x4x4", 1 << 20, "attention", 13.0),
        ("v6e:4x4", 1 << 20, "nothing", 31.0),
        ("v5p:4x4x4", 1 << 22, "nothing", 60.0),
    ],
)
def test_full_fine_tuning_of_a_long_row_fits(topology: str, tokens: int, keeps: str, most: float) -> None:
    pytest.importorskip("libtpu")
    found = million(topology, tokens, keeps)
    assert found.peak_bytes <= most * 2**30, c.gib(found.peak_bytes)


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
