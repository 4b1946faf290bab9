"""Counting collectives in compiled programs, against hand-written HLO and hand arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

from shardpar.lowering.collectives import Collective, collectives
from shardpar.lowering.program import Program
from shardpar.lowering.shardings import partition_spec
from tests.lowering.tiny import captured, uniform

HLO = """\
HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %r = f32[] add(%x, %y)
}

%take (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %c = s32[] constant(0)
  ROOT %d = f32[2,4]{1,0} dynamic-slice(%p, %c, %c), dynamic_slice_sizes={2,4}
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %v = f32[8]{0} get-tuple-element(%t), index=1
  %s = f32[8]{0} all-reduce(%v), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %o = (s32[], f32[8]{0}) tuple(%i, %s)
}

%cond (t: (s32[], f32[8])) -> pred[] {
  %t = (s32[], f32[8]{0}) parameter(0)
  ROOT %k = pred[] constant(true)
}

ENTRY %main (a: f32[8], b: f32[8,4], c: bf16[2,4]) -> f32[2,4] {
  %a = f32[8]{0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  %c = bf16[2,4]{1,0} parameter(2)
  %z = s32[] constant(0)
  %t0 = (s32[], f32[8]{0}) tuple(%z, %a)
  %w = (s32[], f32[8]{0}) while(%t0), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %g = bf16[8,4]{1,0} all-gather(%c), replica_groups=[1,4]<=[4], dimensions={0}
  %m = (f32[8,4]{1,0}, f32[8]{0}) all-reduce(%b, %a), \
replica_groups=mesh['x'=4,'y'=1] {'x'}, to_apply=%add
  %m0 = f32[8,4]{1,0} get-tuple-element(%m), index=0
  %m1 = f32[8]{0} get-tuple-element(%m), index=1
  ROOT %f = f32[2,4]{1,0} fusion(%m0), kind=kLoop, calls=%take
}
"""


def test_loops_multiply_and_a_sliced_all_reduce_is_a_reduce_scatter():
    assert collectives(HLO) == (
        Collective("all-reduce", 2, 5, 5 * 8 * 4),
        Collective("all-gather", 4, 1, 8 * 4 * 2),
        Collective("all-reduce", 4, 1, 8 * 4),
        Collective("reduce-scatter", 4, 1, 8 * 4 * 4 // 4),
    )


def test_a_program_that_xla_compiled_is_counted_right():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, partition_spec((("x",), ())))
    whole = NamedSharding(mesh, partition_spec(((), ())))
    compiled = (
        jax.jit(lambda x: x * 2, in_shardings=rows, out_shardings=whole)
        .lower(jax.ShapeDtypeStruct((8, 16), jnp.float32))
        .compile()
    )
    assert collectives(compiled.as_text()) == (Collective("all-gather", 4, 1, 8 * 16 * 4),)


def test_data_parallel_moves_each_gradient_once_and_nothing_else():
    source = captured(tied=False)
    program = Program(source, uniform(), optax.adamw(1e-3))
    found = collectives(program.compiled_step.as_text())
    assert {c.kind for c in found} == {"all-reduce"}
    # Every float32 gradient, and the loss sum (its weight is a constant).
    gradients = 4 * source.graph.num_parameters
    assert gradients <= sum(c.num_bytes for c in found) <= gradients + 64


def test_fsdp_gathers_parameters_and_scatters_gradients():
    source = captured(width=256, tied=False)
    program = Program(source, uniform(fsdp=("a", "b", "c")), optax.adamw(1e-3))
    found = {c.kind: c for c in collectives(program.compiled_step.as_text())}
    sizes = {name: 4 * p.size for name, _, p in source.graph.parameters}
    split = sum(size for size in sizes.values() if size >= 4 * 2**14)
    small = sum(size for size in sizes.values() if size < 4 * 2**14)
    # XLA:CPU may merge the second gather with the first: once or twice each.
    assert split <= found["all-gather"].num_bytes <= 2 * split
    # The lookup's gradient may go by an all-to-all of the rows instead, which is fewer bytes.
    assert found["reduce-scatter"].num_bytes * 8 in (split, split - sizes["embed.table"])
    assert small <= found["all-reduce"].num_bytes <= small + 128
