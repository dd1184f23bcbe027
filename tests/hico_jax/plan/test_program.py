"""Reading a compiled program: one written by hand, as a TPU's compiler writes them, and one of this machine."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from hico_jax.plan import program

TEXT = """HloModule jit_step, is_scheduled=true

%inner.body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %k = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %s = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%k), channel_id=1
  %d = bf16[4,8]{1,0} collective-permute-done(%s)
  ROOT %t = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%i, %d)
}

%inner.cond (p: (s32[], bf16[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%outer.body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %w = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%p), condition=%inner.cond, body=%inner.body
  ROOT %g = f32[16]{0} all-gather(%x), dimensions={0}, metadata={op_name="jit(step)/clips/gather"}
}

%outer.cond (p: (s32[], bf16[4,8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[4,8]) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %r = (f32[2,2]{1,0}, /*index=1*/bf16[2]{0}) all-reduce(%x, %x), to_apply=%add
  ROOT %w = (s32[], bf16[4,8]{1,0}) while(%t), condition=%outer.cond, body=%outer.body, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_collectives_count_as_often_as_their_loops_run() -> None:
    found = program.collectives_of(TEXT)
    assert found == (
        program.Collective("collective-permute", "bf16[4,8]", 18, 64),
        program.Collective("all-gather", "f32[16]", 3, 64),
        program.Collective("all-reduce", "f32[2,2]", 1, 20),
    )
    assert program.by_kind(found)["collective-permute"] == (18, 18 * 64)
    assert program.collectives_of("") == ()


def test_operations_and_scopes() -> None:
    assert program.operations(TEXT)["while"] == 2
    assert program.within(TEXT, "clips") == {"all-gather": 1}
    assert program.within(TEXT, "clip") == {}


def test_a_program_of_this_machine() -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("x")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def around(x: jax.Array) -> jax.Array:
        with jax.named_scope("hops"):
            hop = lambda x, _: (jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]), None)
            return jax.lax.scan(hop, x, None, length=5)[0]

    text = around.lower(jnp.zeros((8, 4))).compile().as_text()
    assert program.by_kind(program.collectives_of(text)) == {"collective-permute": (5, 5 * 16)}
    assert "collective-permute" in program.within(text, "hops")
