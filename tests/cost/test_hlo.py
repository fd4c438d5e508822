"""Collectives read from HLO: texts of every notation, and programs whose traffic is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.cost import Collective, collectives, wire_bytes
from jmeta.cost.hlo import shape_bytes

LOOPS = """HloModule jit_f, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p = (s32[], f32[10]{0}) parameter(0)
  %v = f32[10]{0} get-tuple-element(%p), index=1
  %r = f32[10]{0} all-reduce(%v), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[], f32[10]{0}) tuple(%p, %r)
}

%inner_cond (p: (s32[], f32[10])) -> pred[] {
  %p = (s32[], f32[10]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%outer_body (p: (s32[], f32[10])) -> (s32[], f32[10]) {
  %p = (s32[], f32[10]{0}) parameter(0)
  %w = (s32[], f32[10]{0}) while(%p), condition=%inner_cond, body=%inner_body
  ROOT %t = (s32[], f32[10]{0}) tuple(%p, %w)
}

%outer_cond (p: (s32[], f32[10])) -> pred[] {
  %p = (s32[], f32[10]{0}) parameter(0)
  ROOT %c = pred[] custom-call(%p), custom_call_target="whether"
}

ENTRY %main (a: f32[10]) -> (f32[10], bf16[4,6]) {
  %a = f32[10]{0} parameter(0)
  %w = (s32[], f32[10]{0}) while(%a), condition=%outer_cond, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %g = bf16[4,6]{1,0} all-gather(%a), replica_groups=[1,4]<=[4], dimensions={0}, metadata={op_name="jit(f)/gather"}
  ROOT %t = (f32[10]{0}, bf16[4,6]{1,0}) tuple(%w, %g)
}
"""  # noqa: E501

TPU = """HloModule jit_step, num_partitions=16

%all-reduce-scatter.1 (p: f32[8,128]) -> f32[2,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %r = f32[8,128]{1,0:T(8,128)} all-reduce(%p), channel_id=3, replica_groups=mesh['a'=4,'b'=4]{'b'}, to_apply=%add
  ROOT %s = f32[2,128]{1,0:T(8,128)} dynamic-slice(%r), dynamic_slice_sizes={2,128}
}

%begin (p: bf16[2,160]) -> bf16[2,1280] {
  %p = bf16[2,160]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[2,1280]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=1,'b'=8,'c'=2], device_ids=([2,8]T(1,0)) {'b'}, dimensions={1}
}

%carry_on (p: bf16[2,160]) -> bf16[2,1280] {
  %p = bf16[2,160]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[2,1280]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=1,'b'=8,'c'=2], device_ids=([2,8]T(1,0)) {'b'}, dimensions={1}
}

ENTRY %main (a: f32[8,128]) -> f32[2,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = bf16[2,160]{1,0:T(8,128)(2,1)} parameter(1)
  %async-collective-start.1 = (bf16[2,160]{1,0}, bf16[2,1280]{1,0}) fusion(%b), kind=kCustom, calls=%begin
  %fusion.2 = bf16[2,1280]{1,0} fusion(%b), kind=kOutput, calls=%carry_on
  %async-collective-done.1 = bf16[2,1280]{1,0} fusion(%b), kind=kCustom, calls=%carry_on
  %start = (f32[4]{0}, f32[16]{0}, /*index=2*/u32[], u32[]) all-gather-start(%a), replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
  %end = f32[16]{0} all-gather-done(%start)
  %send = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
  %sent = f32[6]{0} collective-permute-done(%send)
  %both = (f32[2]{0}, f32[3]{0}) all-reduce-start(%a, %a), replica_groups={}, to_apply=%add
  %half = f32[8,128]{1,0:T(8,128)} all-reduce(%a), replica_groups=mesh['a'=16]{'a':(1)4}, to_apply=%add
  ROOT %fusion.1 = f32[2,128]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_loops_are_multiplied_out_by_note_and_by_condition():
    assert collectives(LOOPS) == [
        Collective("all-reduce", 40, 2, 15, True, ("f32[10]",), ""),
        Collective("all-gather", 48, 4, 1, False, ("bf16[4,6]",), "jit(f)/gather"),
    ]


def test_a_loop_of_unknown_length_counts_once():
    unknown = LOOPS.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    assert [c.times for c in collectives(unknown)] == [3, 1]


def test_the_notations_of_a_tpu():
    found = [(c.kind, c.bytes, c.devices) for c in collectives(TPU)]
    assert found == [
        ("all-gather", 2 * 1280 * 2, 8),  # begun, carried on and ended: one transfer
        ("all-gather", 16 * 4, 4),
        ("collective-permute", 6 * 4, 16),
        ("all-reduce", 5 * 4, 16),
        ("all-reduce", 8 * 128 * 4, 4),
        ("reduce-scatter", 8 * 128 * 4, 4),
    ]


def test_bytes_on_the_wire_by_the_ring():
    def sent(kind, devices):
        return wire_bytes(Collective(kind, 800, devices, 3, True, (), ""))

    assert sent("all-reduce", 8) == 3 * 2 * 7 / 8 * 800
    assert sent("reduce-scatter", 8) == sent("all-gather", 8) == sent("all-to-all", 8)
    assert sent("all-gather", 8) == 3 * 7 / 8 * 800
    assert sent("collective-permute", 8) == 2400
    assert sent("all-reduce", 1) == 0


def test_what_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match=r"no ENTRY computation; pass compiled\.as_text"):
        collectives("module @jit_f { func.func }")
    with pytest.raises(ValueError, match="'f32' is no HLO shape"):
        shape_bytes("f32")


def compiled(function, specs, shapes, out, mesh):
    layout = [jax.NamedSharding(mesh, spec) for spec in specs]
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=each)
        for shape, each in zip(shapes, layout, strict=True)
    ]
    return jax.jit(function, out_shardings=out).lower(*arrays).compile().as_text()


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def read(text):
    return [(c.kind, c.bytes, c.devices, c.times, c.looped) for c in collectives(text)]


def test_a_data_parallel_gradient_is_one_reduction_of_the_parameters(mesh):
    everywhere = jax.NamedSharding(mesh, jax.P())

    def gradient(w, x):
        return jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w)

    text = compiled(gradient, [jax.P(), jax.P(("a", "b"))], [(16, 32), (64, 16)], everywhere, mesh)
    assert read(text) == [("all-reduce", 16 * 32 * 4, 8, 1, False)]


def test_each_collective_of_a_shard_map(mesh):
    spec = jax.P("b")

    def one(function):
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"a", "b"},
            check_vma=False,
        )  # fmt: skip
        return read(compiled(mapped, [spec], [(32, 4)], jax.NamedSharding(mesh, spec), mesh))

    # 8 x 4 floats on each device: 128 bytes.
    around = [(i, (i + 1) % 4) for i in range(4)]
    assert one(lambda x: jax.lax.psum(x, "b")) == [("all-reduce", 128, 4, 1, False)]
    assert one(lambda x: jax.lax.all_gather(x, "b")[0]) == [("all-gather", 512, 4, 1, False)]
    assert one(lambda x: jax.lax.ppermute(x, "b", around)) == [
        ("collective-permute", 128, 8, 1, False)
    ]
    scattered = one(lambda x: jnp.tile(jax.lax.psum_scatter(x, "b", tiled=True), (4, 1)))
    assert scattered == [("reduce-scatter", 128, 4, 1, False)]
    exchanged = one(lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True))
    assert [row[0] for row in exchanged] == ["all-to-all"]
    assert exchanged[0][1:] == (128, 4, 1, False)


def test_a_collective_in_a_compiled_loop_counts_each_time(mesh):
    def loop(x):
        step = lambda _, c: jnp.tanh(jax.lax.psum(c, ("a", "b")))  # noqa: E731
        return jax.lax.fori_loop(0, 7, step, x)

    mapped = jax.shard_map(loop, mesh=mesh, in_specs=jax.P("b"), out_specs=jax.P("b"),
                           check_vma=False)  # fmt: skip
    layout = jax.NamedSharding(mesh, jax.P("b"))
    found = collectives(compiled(mapped, [jax.P("b")], [(40, 3)], layout, mesh))
    assert [(c.kind, c.bytes, c.looped) for c in found] == [("all-reduce", 120, True)]
    assert found[0].times == 7
    assert np.isclose(wire_bytes(found[0]), 7 * 2 * 7 / 8 * 120)
