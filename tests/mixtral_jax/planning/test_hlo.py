"""The reader of compiled programs: it reads what is printed, and refuses what it does not know."""

import re

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax.planning.hlo import HloError, parse
from mixtral_jax.planning.traffic import program_traffic

PROGRAM = """HloModule jit_f, is_scheduled=true

FileNames
1 "f.py"

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%double (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %sum = f32[4]{0} add(%p, %p)
}, execution_thread="main"

ENTRY %main (a: f32[4], b: s4[3]) -> (f32[4], s4[3]) {
  %a = f32[4]{0} parameter(0), metadata={op_name="arrays[0]"}
  %b = s4[3]{0:T(256)S(1)} parameter(1)
  %c = f32[4]{0} constant({1, 2, 3, 4})
  %twice = f32[4]{0} fusion(%a), kind=kLoop, calls=%double
  ROOT %out = (f32[4]{0}, /*index=1*/s4[3]{0}) tuple(%twice, /*index=1*/%b)
}
"""


def test_instructions_are_read() -> None:
    program = parse(PROGRAM)
    entry = program.entry
    assert list(entry.instructions) == ["a", "b", "c", "twice", "out"]
    assert entry.root.operands == ["twice", "b"]
    assert [array.nbytes for array in entry.root.arrays] == [16, 2]  # three halves of a byte
    b = entry.instructions["b"]
    assert (b.arrays[0].in_main_memory, b.main_memory_bytes) == (False, 0)
    assert entry.instructions["c"].operands == []
    assert entry.instructions["a"].op_name == "arrays[0]"
    assert program.called_by(entry.instructions["twice"]).root.operands == ["p", "p"]


@pytest.mark.parametrize(
    "respell",
    [
        lambda text: text.replace("%", ""),
        lambda text: text.replace("fusion(%a)", "fusion(f32[4]{0} %a)"),
        lambda text: text.replace("(p: f32[4]) -> f32[4] {", "{"),
    ],
    ids=["without percent signs", "operands with types", "computations without types"],
)
def test_other_ways_to_print_mean_the_same(respell: object) -> None:
    assert callable(respell)
    again = respell(PROGRAM)
    assert again != PROGRAM
    assert program_traffic(again) == program_traffic(PROGRAM)
    assert program_traffic(again).nbytes == 32  # a read, its double written


def test_a_real_program_moves_the_same_bytes_with_and_without_percent_signs() -> None:
    """A loop, a gather and a product, as the compiler of this machine prints them."""

    def step(weights: jax.Array, rows: jax.Array) -> jax.Array:
        x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ weights), weights)
        return x[rows]

    shapes = jnp.ones((16, 16)), jnp.zeros(4, jnp.int32)
    text = jax.jit(step).lower(*shapes).compile().as_text()
    assert text is not None
    assert "%" in text
    bare = re.sub(r"%([\w.\-]+)", r"\1", text)
    assert program_traffic(bare) == program_traffic(text)
    assert program_traffic(bare).nbytes > 3 * 16 * 16 * 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  %c = f32[4]{0} constant({1, 2, 3, 4})", "  something new", "line 17 .* 'something new"),
        ("  %c = f32[4]{0} con", "  %c is f32[4]{0} con", "line 17 .*%c is f32"),
        ("fusion(%a)", "fusion(%lost)", "line 18 .*operand 'lost', which main does not define"),
        ("fusion(%a)", "fusion(a b; c)", "line 18 .*not understood"),
        ("fusion(%a)", "fusion[%a]", "line 18 .*not understood"),
        ("fusion(%a), kind", "fusion(%a, kind", "line 18 .*not understood"),
        ("%c = f32[4]", "%c = q7z[4]", "line 17 .*not understood"),
        ("%c = f32[4]", "%c = f32[4;2]", "line 17 .*not understood"),
        ("%c =", "%a =", "line 17 .*not understood"),
        ("HloModule jit_f", "A letter to the editor", "line 1 .*'A letter to the editor"),
        ("ENTRY ", "", "has no entry"),
        ("calls=%double", "calls=%treble", "line 18 calls an unknown computation"),
        ("ROOT %sum", "%sum", "computation double has no ROOT"),
    ],
)
def test_text_that_is_not_understood_is_refused(old: str, new: str, message: str) -> None:
    assert old in PROGRAM
    with pytest.raises(HloError, match=message):
        program_traffic(PROGRAM.replace(old, new))


def test_an_entry_without_instructions_is_refused() -> None:
    with pytest.raises(HloError, match="its entry has no instructions"):
        parse("HloModule m\n\nENTRY %main () -> () {\n}\n")


def test_a_program_that_was_cut_short_is_refused() -> None:
    with pytest.raises(HloError, match="computation main does not end"):
        parse(PROGRAM[: PROGRAM.index("ROOT %out")])


def test_a_collective_without_known_groups_is_refused() -> None:
    text = PROGRAM.replace("fusion(%a), kind=kLoop", "all-reduce(%a), replica_groups=all")
    with pytest.raises(HloError, match="no replica groups"):
        program_traffic(text)
