"""Bytes and collectives of programs that are short enough to count by hand."""

import pytest

from mixtral_jax.planning.traffic import program_traffic
from mixtral_jax.roofline.collective import Collective

PROGRAM = """
HloModule jit_block

%put (p: f32[100,4], rows: f32[2,4], at: s32[2,1]) -> f32[100,4] {
  %p = f32[100,4]{1,0} parameter(0)
  %at = s32[2,1]{1,0} parameter(2)
  %rows = f32[2,4]{1,0} parameter(1)
  ROOT %scatter.1 = f32[100,4]{1,0} scatter(%p, %at, %rows), to_apply=%add
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %v = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %w = f32[8,4]{1,0} negate(%v)
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %w)
}

ENTRY %main (a: f32[8,4], x: f32[2,4], pages: f32[100,4], at: s32[2,1]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0), metadata={op_name="arrays[0]"}
  %x = f32[2,4]{1,0} parameter(1), metadata={op_name="x"}
  %pages = f32[100,4]{1,0} parameter(2), metadata={op_name="pages"}
  %at = s32[2,1]{1,0} parameter(3), metadata={op_name="batch.positions"}
  %near = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %here = f32[8,4]{1,0:S(1)} copy-done(%near)
  %y = f32[2,8]{1,0:S(1)} dot(%x, %here), metadata={op_name="dot"}
  %z = f32[2,8]{1,0} all-reduce(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %written = f32[100,4]{1,0} fusion(%pages, %x, %at), kind=kInput, calls=%put
  %seen = f32[2,4]{1,0} custom-call(%x, %written), custom_call_target="attend"
  %bad = f32[16,4]{1,0} all-gather(%a), replica_groups=[4,2]<=[8], dimensions={0}
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_bytes_and_collectives_are_read_from_a_program() -> None:
    found = program_traffic(PROGRAM)
    by_hand = {
        "copy of a to near memory: read": 128,
        "dot: x": 32,
        "all-reduce: written": 64,
        "put: rows and places read, rows written": 32 + 8 + 32,
        "attend: x read, result written; pages are left to the caller": 32 + 32,
        "all-gather: a read, twice as much written": 128 + 256,
        "five rounds: read and written": 5 * (128 + 128),
    }
    assert found.nbytes == sum(by_hand.values())
    assert found.collectives == (
        Collective("all-reduce", 64, 4, moves_weights=False),
        Collective("all-gather", 256, 2, moves_weights=True),
    )
    assert found.kernels == {"attend": 1}


FUSED = """
%same (p: f32[8,4]) -> f32[4,8] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %b = f32[4,8]{1,0} bitcast(%p)
}

%product (w: f32[8,4], x: f32[2,8], at: s32[]) -> f32[2,4] {
  %x = f32[2,8]{1,0} parameter(1)
  %w = f32[8,4]{1,0} parameter(0)
  %turned = f32[4,8]{1,0} fusion(%w), kind=kLoop, calls=%same
  ROOT %dot = f32[2,4]{1,0} dot(%x, %turned)
}

%row (table: f32[8,4], at: s32[]) -> f32[1,4] {
  %table = f32[8,4]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %slice = f32[1,4]{1,0} dynamic-slice(%table, %at, %at), dynamic_slice_sizes={1,4}
}

ENTRY %main (a: f32[8,4], x: f32[2,8], at: s32[]) -> f32[2,4] {
  %a = f32[8,4]{1,0} parameter(0), metadata={op_name="arrays[0]"}
  %x = f32[2,8]{1,0} parameter(1), metadata={op_name="x"}
  %at = s32[] parameter(2), metadata={op_name="at"}
  %one = f32[1,4]{1,0} fusion(%a, %at), kind=kLoop, calls=%row
  ROOT %out = f32[2,4]{1,0} fusion(%a, %x), kind=kOutput, calls=%product
}
"""


CHAINED = """
%begin (p: f32[8,4]) -> f32[16,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %g1 = f32[16,4]{1,0} all-gather(%p), replica_groups={{0,1}}, \
frontend_attributes={chain_id="0"}
}

%end (p: f32[16,4]) -> f32[16,4] {
  %p = f32[16,4]{1,0} parameter(0)
  ROOT %g2 = f32[16,4]{1,0} all-gather(%p), replica_groups={{0,1}}, \
frontend_attributes={chain_id="0"}
}

ENTRY %main (a: f32[8,4]) -> f32[16,4] {
  %a = f32[8,4]{1,0} parameter(0), metadata={op_name="arrays[0]"}
  %under_way = f32[16,4]{1,0} fusion(%a), kind=kCustom, calls=%begin
  ROOT %out = f32[16,4]{1,0} fusion(%under_way), kind=kCustom, calls=%end
}
"""


@pytest.mark.parametrize(
    ("name", "call", "kernel"),
    [
        ("gmm.3", 'custom_call_target="tpu_custom_call"', "gmm"),
        (
            "pallas_call.1",
            'custom_call_target="__gpu$xla.gpu.triton", '
            'metadata={op_name="jit(f)/paged_decode/pallas_call"}',
            "paged_decode",
        ),
        ("c", 'custom_call_target="AllocateBuffer"', None),
    ],
)
def test_a_kernel_is_called_by_its_function(name: str, call: str, kernel: str | None) -> None:
    text = PROGRAM.replace("%seen =", f"%{name} =").replace('custom_call_target="attend"', call)
    assert program_traffic(text).kernels == ({kernel: 1} if kernel else {})


def test_a_collective_beside_other_work_is_found_once() -> None:
    found = program_traffic(CHAINED.replace("\\\n", ""))
    assert found.collectives == (Collective("all-gather", 256, 2, moves_weights=True),)


def test_a_collective_on_the_sparse_cores_of_a_tpu_is_found() -> None:
    """TPU v7x calls a computation of its own for it; what is prepared beside moves nothing."""
    found = program_traffic("""
HloModule jit_block

%on_sparse_core (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %sum = f32[8,4]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %ready = token[] custom-call(%a), custom_call_target="PrepareAsyncCallDone"
  %begun = ((f32[8,4]{1,0}, token[]), f32[8,4]{1,0}) call-start(%a, %ready), \
async_execution_thread="sparsecore", to_apply=%on_sparse_core
  ROOT %done = f32[8,4]{1,0} call-done(%begun)
}
""")
    assert found.collectives == (Collective("all-reduce", 128, 2, moves_weights=False),)
    assert found.kernels == {}


def test_a_fusion_reads_all_of_what_it_multiplies_and_little_of_what_it_slices() -> None:
    row = 16 + 4 + 16  # read, its place, written
    product = 128 + 64 + 32
    assert program_traffic(FUSED).nbytes == row + product


def test_a_kernel_reads_the_experts_that_are_touched() -> None:
    text = PROGRAM.replace("f32[8,4]{1,0} parameter(0), m", "f32[8,2,2]{2,1,0} parameter(0), m")
    text = text.replace("custom-call(%x, %written)", "custom-call(%a, %written)")
    whole, half = program_traffic(text, 1.0, 8).nbytes, program_traffic(text, 0.5, 8).nbytes
    assert whole - half == 64


CONDITIONAL = """
%double (t: (f32[8,4])) -> f32[8,4] {
  %t = (f32[8,4]{1,0}) parameter(0)
  %v = f32[8,4]{1,0} get-tuple-element(%t), index=0
  ROOT %w = f32[8,4]{1,0} add(%v, %v)
}

%same (t: (f32[8,4])) -> f32[8,4] {
  %t = (f32[8,4]{1,0}) parameter(0)
  ROOT %v = f32[8,4]{1,0} get-tuple-element(%t), index=0
}

ENTRY %main (a: f32[8,4], p: pred[]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0), metadata={op_name="arrays[0]"}
  %p = pred[] parameter(1), metadata={op_name="p"}
  %given = (f32[8,4]{1,0}) tuple(%a)
  ROOT %out = f32[8,4]{1,0} conditional(%p, %given, %given), BRANCHES
}
"""


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%same, %double}",
        "true_computation=%double, false_computation=%same",
        "true_computation=%same, false_computation=%double",
    ],
)
def test_of_a_conditional_the_branch_that_moves_most_counts(branches: str) -> None:
    """Adding an array to itself reads it twice and writes it; the other branch moves nothing."""
    assert program_traffic(CONDITIONAL.replace("BRANCHES", branches)).nbytes == 3 * 128
