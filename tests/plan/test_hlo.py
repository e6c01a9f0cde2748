"""The reader of compiled programs: every way to write a group, a loop and a product, and real programs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxrl import parallel
from jaxrl.plan import hlo

MESH = {"data": 2, "fsdp": 4, "tensor": 2}  # device = data * 8 + fsdp * 2 + tensor

GROUPS = {
    "replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}": (("fsdp",), 4),
    "replica_groups={{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}": (("tensor",), 2),
    "replica_groups={}": (("data", "fsdp", "tensor"), 16),
    "replica_groups=[8,2]<=[16]": (("tensor",), 2),
    "replica_groups=[4,4]<=[2,4,2]T(0,2,1)": (("fsdp",), 4),
    "replica_groups=[8,2]<=[2,8]T(1,0)": (("data",), 2),
    "replica_groups=[2,8]<=[16]": (("fsdp", "tensor"), 8),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=2] {'axis_1'}": (("fsdp",), 4),
    "replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=2] {'axis_0','axis_2'}": (("data", "tensor"), 4),
    "replica_groups=mesh['axis_0'=2,'axis_1'=8], device_ids=([8,2]T(1,0)) {'axis_0'}": (("tensor",), 2),
    "source_target_pairs={{0,2},{2,4},{4,6},{6,0}}": (("fsdp",), 2),
    "replica_groups=[16,1]<=[16]": ((), 1),
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_are_found_along_their_axes(text):
    line = f"  %x = f32[8,16]{{1,0}} all-reduce(%y), channel_id=1, {text}, use_global_device_ids=true, to_apply=%add"
    one = hlo._instruction(line)
    assert one is not None
    assert hlo._group(one, MESH) == GROUPS[text]


PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (carry: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %carry = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %v = f32[8,16]{1,0:T(8,128)} get-tuple-element(%carry), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %w = f32[8,16]{1,0:T(8,128)} all-reduce(%v), channel_id=1, replica_groups=[4,4]<=[2,4,2]T(0,2,1), to_apply=%add
  ROOT %tuple = (s32[]{:T(128)}, /*index=1*/f32[8,16]{1,0:T(8,128)}) tuple(%next, %w)
}

%condition (carry: (s32[], f32[8,16])) -> pred[] {
  %carry = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %limit = s32[]{:T(128)} constant(9)
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%all-reduce-scatter.3 (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  %r = f32[8,16]{1,0:T(8,128)} all-reduce(%p), channel_id=3, replica_groups=[4,4]<=[2,4,2]T(0,2,1), to_apply=%add
  ROOT %s = f32[2,16]{1,0:T(8,128)} dynamic-slice(%r), dynamic_slice_sizes={2,16}
}

%fused_computation.1 (p: f32[8,16]) -> f32[32,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %g1 = f32[32,16]{1,0} all-gather(%p), channel_id=9, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={0}
}

%async_collective_fusion.2 (p: f32[8,16]) -> f32[32,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %g1 = f32[32,16]{1,0} all-gather(%p), channel_id=9, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={0}
}

%fused_computation.3 (p: f32[8,16]) -> f32[32,16] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %g1 = f32[32,16]{1,0} all-gather(%p), channel_id=9, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={0}
}

ENTRY %main (a: f32[8,16], b: bf16[16,32]) -> f32[8,32] {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %b = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %start = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%one, %a)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %known = (s32[], f32[8,16]) while(%start), condition=%condition, body=%body, attr={"known_trip_count":{"n":"3"}}
  %v = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %g = (f32[8,16]{1,0}, f32[16,16]{1,0}) all-gather-start(%v), channel_id=2, replica_groups=[8,2]<=[16], dimensions={0}
  %h = f32[16,16]{1,0} all-gather-done(%g)
  %f = f32[2,16]{1,0:T(8,128)} fusion(%v), kind=kCustom, calls=%all-reduce-scatter.3
  %p1 = f32[32,16]{1,0:T(8,128)} fusion(%v), kind=kCustom, calls=%fused_computation.1
  %p2 = f32[32,16]{1,0:T(8,128)} fusion(%v), kind=kOutput, calls=%async_collective_fusion.2
  %p3 = f32[32,16]{1,0:T(8,128)} fusion(%v), kind=kCustom, calls=%fused_computation.3
  %k = f32[8,16]{1,0} custom-call(%v), custom_call_target="tpu_custom_call", metadata={op_name="kernel"}
  ROOT %dot = f32[8,32]{1,0:T(8,128)} dot(%v, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_a_program_by_hand():
    """The loop goes 1, 3, 5, 7: four rounds; the other says three. A gather sends what it holds."""
    found = hlo.count(PROGRAM, MESH)
    size = 8 * 16 * 4
    assert hlo.by_kind_and_axis(found.traffic) == {
        "all-reduce fsdp": 7 * 2 * size * 3 / 4,
        "reduce-scatter fsdp": size * 3 / 4,
        "all-gather tensor": size,
        "all-gather fsdp": 3 * size,  # once, though it begins, goes on and ends in three fusions
    }
    assert {x.kind: x.count for x in found.traffic} == {"all-reduce": 7, "reduce-scatter": 1, "all-gather": 1}
    assert found.flops == 2 * 8 * 32 * 16
    assert found.kernels == {"k": 1} and found.unknown_loops == 0


CONVOLUTIONS = {
    # [256, 64] x [64, 128], as TPUs write a product
    ("f32[256,128]", "f32[256,64]", "f32[64,128]", "dim_labels=bf_io->bf"): 2 * 256 * 128 * 64,
    ("f32[256,128]", "f32[256,64]", "f32[128,64]", "dim_labels=bf_oi->bf"): 2 * 256 * 128 * 64,
    # a batch axis as a window
    ("bf16[4,20,96]", "bf16[4,20,64]", "bf16[64,96,1]", "window={size=1}, dim_labels=0bf_io0->0bf"): 2
    * 4
    * 20
    * 96
    * 64,
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_products_written_as_convolutions(case):
    out, left, right, rest = case
    table = {
        name: hlo.Instruction(name, shape, "parameter", (), "", False) for name, shape in (("l", left), ("r", right))
    }
    one = hlo.Instruction("c", out, "convolution", ("l", "r"), f"(%l, %r), {rest}", False)
    assert hlo._convolution(one, table) == CONVOLUTIONS[case]


def test_a_window_that_reads_padding_costs_nothing_there():
    """Two heads of 128 from one place of width 96: the window of two reads padding at the other one."""
    table = {
        "l": hlo.Instruction("l", "bf16[1,20,96]", "parameter", (), "", False),
        "r": hlo.Instruction("r", "bf16[2,128,96]", "parameter", (), "", False),
    }
    rest = "(%l, %r), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=0bf_0oi->0bf"
    one = hlo.Instruction("c", "bf16[2,20,128]", "convolution", ("l", "r"), rest, False)
    assert hlo._convolution(one, table) == 2 * 2 * 20 * 128 * 96


def compiled(f, *args, mesh):
    return jax.jit(f).lower(*args).compile().as_text(), dict(mesh.shape)


def test_a_real_program_under_shard_map():
    """Collectives in a scan: each kind, its axis, its bytes and its rounds."""
    mesh = parallel.make_mesh("fsdp=4,tensor=2")
    f32 = jax.ShapeDtypeStruct((8, 64), jnp.float32)

    @partial(jax.shard_map, mesh=mesh, in_specs=P("fsdp", "tensor"), out_specs=P("fsdp", "tensor"), check_vma=False)
    def f(x):
        def step(x, _):
            whole = lax.all_gather(x, "fsdp", tiled=True)
            summed = lax.psum(jnp.sin(whole), "tensor")
            x = lax.psum_scatter(jnp.cos(summed), "fsdp", tiled=True)
            return lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), None

        return lax.scan(step, x, None, length=5)[0]

    found = hlo.count(*compiled(f, f32, mesh=mesh))
    part = 2 * 32 * 4  # a device's own
    sent = hlo.by_kind_and_axis(found.traffic)
    assert sent["all-gather fsdp"] == 5 * 3 * part
    assert sent["all-reduce tensor"] == 5 * 2 * (4 * part) / 2
    assert sent["collective-permute fsdp"] == 5 * part
    scattered = sent.get("reduce-scatter fsdp", sent.get("all-reduce fsdp", 0) / 2)  # the CPU may reduce all
    assert scattered == 5 * 4 * part * 3 / 4
    assert found.unknown_loops == 0


def test_flops_of_a_scan_are_those_of_all_its_rounds():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 32), (7, 32, 32)))
    f = lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    text = jax.jit(f).lower(x, w).compile().as_text()
    assert hlo.count(text, {"data": 1}).flops == 7 * 2 * 16 * 32 * 32


def test_loops_of_unknown_length_are_said():
    def f(x, n):
        return lax.while_loop(lambda c: c[0].sum() < n, lambda c: (c[0] @ c[0], c[1] + 1), (x, 0))[0]

    text = jax.jit(f).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32), jnp.float32(3)).compile().as_text()
    found = hlo.count(text, {"data": 1})
    assert found.unknown_loops == 1 and found.flops == 2 * 8**3


def test_sizes_of_shapes():
    assert hlo.size_of("(f32[2,3]{1,0:T(8,128)}, /*index=1*/bf16[4]{0}, pred[8], s4[6], f8e4m3fn[5], u32[])") == (
        24 + 8 + 8 + 3 + 5 + 4
    )
    assert np.isclose(hlo.size_of("token[]"), 0)
