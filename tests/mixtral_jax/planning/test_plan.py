"""`mixtral-jax plan`: figures worked out by hand, and the bytes that really live on devices."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx
from typer.testing import CliRunner

from mixtral_jax.cli.main import app
from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError, TopologyError
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.planning import traffic
from mixtral_jax.planning.chips import GIB, topologies
from mixtral_jax.planning.compiler import CompileError, Job, compile_elsewhere
from mixtral_jax.planning.estimate import Load, candidates, split
from mixtral_jax.planning.plan import Answer, estimate, job_of, measured, ranked
from mixtral_jax.planning.search import Search, known_model
from mixtral_jax.planning.topology import environment, installed
from mixtral_jax.planning.traffic import Collective
from mixtral_jax.sharding import ShardingRules, make_mesh
from mixtral_jax.step.programs import Parts

# Mixtral's proportions, so that padding does not count for more than in the real one.
SMALL = replace(
    ModelConfig.mixtral_8x7b_v01(),
    hidden_size=256,
    head_size=16,
    num_heads=16,
    feed_forward_size=896,
    num_layers=3,
    vocab_size=512,
)
DENSE = replace(SMALL, num_experts=0, experts_per_token=0)


def load_of(config: ModelConfig, dtype: str = "float32", **changes: Any) -> Load:
    sizes = {"batch": 8, "context": 256, "prefill": 64} | changes
    return Load(model=config, dtype=dtype, kv_dtype=None, **sizes)


def plan(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["plan", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout) if "--json" in arguments else result.stdout


# --- chips ---


def test_a_topology_is_one_slice_or_all_of_a_chip() -> None:
    (one,) = topologies("tpu:v5e:2x4")
    assert (one.chips, str(one), one.chip.memory) == (8, "tpu:v5e:2x4", int(15.75 * GIB))
    assert [size.chips for size in topologies("tpu:v5p")] == [4, 8, 16, 32, 64, 128, 256, 512]
    assert topologies("gpu:a100-80:4")[0].chips == 4
    assert topologies("cpu:3")[0].chips == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu:v9:2x4", "v9 is no known tpu chip; known are v5e, v5p, v6e"),
        ("tpu:v5e:3x3", "no such slice of v5e; there are 1x1, 2x2, 2x4"),
        ("gpu:h100:7", "no such slice of h100; there are 1, 2, 4, 8"),
        ("abacus:8", "no known platform; give tpu:v5e:2x4"),
        ("tpu", "nothing is no known tpu chip"),
        ("cpu:many", "give cpu:N"),
    ],
)
def test_what_does_not_exist_is_refused(name: str, said: str) -> None:
    with pytest.raises(TopologyError, match=said):
        topologies(name)


# --- what a program moves ---

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
    found = traffic.moved(PROGRAM)
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
    assert traffic.moved(text).kernels == ({kernel: 1} if kernel else {})


def test_a_collective_beside_other_work_is_found_once() -> None:
    found = traffic.moved(CHAINED.replace("\\\n", ""))
    assert found.collectives == (Collective("all-gather", 256, 2, moves_weights=True),)


def test_a_fusion_reads_all_of_what_it_multiplies_and_little_of_what_it_slices() -> None:
    row = 16 + 4 + 16  # read, its place, written
    product = 128 + 64 + 32
    assert traffic.moved(FUSED).nbytes == row + product


def test_a_kernel_reads_the_experts_that_are_touched() -> None:
    text = PROGRAM.replace("f32[8,4]{1,0} parameter(0), m", "f32[8,2,2]{2,1,0} parameter(0), m")
    text = text.replace("custom-call(%x, %written)", "custom-call(%a, %written)")
    whole, half = traffic.moved(text, 1.0, 8).nbytes, traffic.moved(text, 0.5, 8).nbytes
    assert whole - half == 64


def test_collectives_take_as_long_as_a_ring() -> None:
    seconds = {
        kind: Collective(kind, 800, 8, False).seconds(bandwidth=100.0, latency=0.5)
        for kind in ("all-reduce", "all-gather", "collective-permute")
    }
    assert seconds == {
        "all-reduce": 2 * 700 / 100 + 2 * 4 * 0.5,
        "all-gather": 700 / 100 + 4 * 0.5,
        "collective-permute": 8.5,
    }


# --- arithmetic ---


def test_weights_and_pages_of_mixtral_by_hand() -> None:
    (topology,) = topologies("tpu:v5e:2x4")
    config = known_model("mistralai/Mixtral-8x7B-Instruct-v0.1")
    load = Load(model=config, dtype="int8", kv_dtype=None, batch=32, context=2048)
    answer = estimate(load, topology, split(config, 1, 8, 1))
    d, f, kv, vocab = 4096, 14336, 1024, 32000
    attention = (2 * d * d + 2 * d * kv) + 4 * (2 * d + 2 * kv)  # and a scale for each output
    expert = 3 * d * f + 4 * (2 * f + d)
    norms_and_router = 2 * (2 * d + 8 * d)
    # All experts, heads and rows of the vocabulary in eighths, but for o's scales.
    layer = (attention - 4 * d) / 8 + 4 * d + expert + norms_and_router
    ends = 2 * (vocab * d + 4 * vocab) / 8 + 2 * d
    assert answer.weights == 32 * layer + ends
    assert answer.pages == 32 * 2048 * 131_072 / 8
    assert answer.fits
    assert answer.decode.bound == "memory"
    # All eight are touched, as 32 tokens choose two each.
    assert answer.least_bytes == pytest.approx(answer.weights + answer.pages, rel=0.02)


def test_few_tokens_touch_few_experts() -> None:
    (topology,) = topologies("cpu:1")
    one = split(SMALL, 1, 1, 1)
    alone, many = (
        estimate(load_of(SMALL, batch=batch, context=16), topology, one).least_bytes
        for batch in (1, 64)
    )
    experts = 3 * 3 * 8 * 256 * 896 * 4
    page = 16 * 3 * 2 * 8 * 16 * 4
    row = 2 * 3 * 256 * 4
    assert many - alone == pytest.approx(0.75 * experts + 63 * (page + row), rel=1e-6)


def test_a_window_bounds_the_pages() -> None:
    config = known_model("mistral-7b-instruct-v0.1")
    load = Load(model=config, dtype="bfloat16", kv_dtype=None, batch=1, context=32_768)
    assert (load.pages, load.seen) == (257, 4096)
    (topology,) = topologies("gpu:h100:1")
    answer = estimate(load, topology, split(config, 1, 1, 1))
    assert answer.longest_context == 32_768


def test_longest_context_and_largest_batch_are_what_still_fits() -> None:
    (topology,) = topologies("tpu:v5e:2x4")
    config = known_model("mixtral-8x7b-v0.1")
    load = Load(model=config, dtype="int8", kv_dtype=None, batch=32, context=2048)
    one = split(config, 1, 8, 1)
    answer = estimate(load, topology, one)

    def fits(batch: int, context: int) -> bool:
        other = Load(model=config, dtype="int8", kv_dtype=None, batch=batch, context=context)
        return estimate(other, topology, one).fits

    assert fits(32, answer.longest_context)
    assert not fits(32, answer.longest_context + 64)
    assert fits(answer.largest_batch, 2048)
    assert not fits(answer.largest_batch + 2, 2048)


def test_every_split_is_one_that_the_model_can_be_split_into() -> None:
    load = load_of(SMALL)
    found = candidates(load, 8)
    assert {(one.data, one.expert, one.tensor) for one in found} >= {(1, 8, 1), (1, 1, 8)}
    for one in found:
        ShardingRules.of(SMALL, one.mesh, one.dp_attention).check(SMALL, one.mesh)
        assert one.chips == 8
    assert candidates(load_of(DENSE, batch=1), 3) == []


def test_the_best_fits_and_is_fastest() -> None:
    answers = [
        estimate(load_of(SMALL), topology, one)
        for topology in topologies("cpu:8")
        for one in candidates(load_of(SMALL), 8)
    ]
    best, *others = ranked(answers)
    assert all(best.tokens_per_second >= one.tokens_per_second for one in others if one.fits)


# --- against what really lives on devices, and what the compiler says ---


def job_on_cpu(load: Load, shape: tuple[int, int, int], dp_attention: bool) -> tuple[Job, Answer]:
    (topology,) = topologies("cpu:8")
    answer = estimate(load, topology, split(load.model, *shape, dp_attention))
    return job_of(answer), answer


@pytest.mark.parametrize(
    ("config", "dtype", "shape", "dp_attention"),
    [
        (SMALL, "float32", (1, 8, 1), False),
        (SMALL, "int8", (1, 4, 2), True),
        (DENSE, "float32", (2, 2, 2), True),
    ],
    ids=["experts", "int8 and sequences", "dense"],
)
def test_memory_is_what_really_lives_on_devices(
    config: ModelConfig, dtype: str, shape: tuple[int, int, int], dp_attention: bool
) -> None:
    load = load_of(config, dtype)
    job, answer = job_on_cpu(load, shape, dp_attention)
    before = list(jax.live_arrays())  # held, so that no other takes their ids
    data, expert, tensor, copies = job.mesh
    mesh = make_mesh(data, expert, tensor * copies, copies=copies)
    model = Transformer(
        config,
        dtype=dtype,
        rngs=nnx.Rngs(0),
        mesh=mesh,
        rules=ShardingRules.of(config, mesh, dp_attention),
    )
    parts = Parts.of(model)
    layers = parts.empty(parts.pages(job.num_pages, 16))
    jax.block_until_ready(layers)
    lives: dict[jax.Device, int] = {}
    for array in jax.live_arrays():
        if all(array is not other for other in before):
            for shard in array.addressable_shards:
                lives[shard.device] = lives.get(shard.device, 0) + shard.data.nbytes
    # The first device made the values, and may still hold them whole.
    others = [lives[device] for device in jax.devices()[1:]]
    lines: list[str] = []
    found = compile_elsewhere(job, lines.append)
    assert max(others) == min(others) == pytest.approx(found.weights + found.pages, rel=0.03)
    # Arithmetic knows both as well as the compiler does, on CPU, which pads nothing.
    assert (answer.weights, answer.pages) == pytest.approx((found.weights, found.pages), rel=0.03)
    whole = measured(answer, found)
    assert whole.method == "compiled"
    assert whole.total == found.weights + found.pages + found.temporaries + found.programs
    assert not whole.to_json()["collectives_move_weights"]
    # The collectives that arithmetic reckons with are those of the program.
    kinds = [{one.kind for one in step.layer} for step in (whole, answer)]
    assert kinds[0] == kinds[1]
    first = f"compiling step 1 of 2: {job.sequences} tokens"
    assert lines == [first, f"compiling step 2 of 2: {job.prefill} tokens"]


def test_a_program_that_cannot_be_compiled_says_why() -> None:
    job, _ = job_on_cpu(load_of(SMALL), (1, 8, 1), False)
    with pytest.raises(CompileError, match="cannot be split 3 ways"):
        compile_elsewhere(Job(**{**vars(job), "mesh": (1, 3, 1, 1)}))


def test_the_compilers_environment_has_nothing_of_our_devices() -> None:
    (tpu,), (cpu,) = topologies("tpu:v5e:2x2"), topologies("cpu:4")
    given = {"PATH": "/bin", "XLA_FLAGS": "--odd", "JAX_PLATFORMS": "cuda", "TPU_NAME": "mine"}
    assert environment(cpu, given) == {
        "PATH": "/bin",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
    }
    assert environment(tpu, given).keys().isdisjoint({"XLA_FLAGS", "TPU_NAME"})


# --- the command ---

ASKED = {"fits", "bytes_per_chip", "ms_per_decode_step", "tokens_per_second", "bound", "mesh"}


def test_the_command_by_arithmetic(tmp_path: Path) -> None:
    picture = tmp_path / "time.png"
    found = plan(
        "--model=mixtral-8x7b-instruct-v0.1",
        "--dtype=int8",
        "--topology=tpu:v5e:2x4",
        "--batch=32",
        "--context=2048",
        "--price=9.6",
        f"--png={picture}",
        "--estimate",
        "--json",
    )
    assert found.keys() >= ASKED | {"method", "longest_context", "largest_batch"}
    assert (found["fits"], found["method"], found["estimate"]) == (True, "arithmetic", True)
    cost = 9.6 / 3600 / found["tokens_per_second"] * 1e6
    assert found["cost_per_million_tokens"] == pytest.approx(cost)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_compiles_in_a_process_of_its_own() -> None:
    found = plan(
        "--model=tiny-random",
        "--dtype=float32",
        "--topology=cpu:4",
        "--mesh=data=2,expert=2",
        "--batch=4",
        "--context=64",
        "--prefill-tokens=32",
        "--json",
    )
    assert found.keys() >= ASKED
    assert (found["method"], found["mesh"]) == ("compiled", "data=2,expert=2,tensor=1")


def test_a_text_for_people() -> None:
    said = plan("--model=mistral-7b-v0.1", "--topology=gpu:h100:1", "--estimate", "--price=2")
    for part in ("fits", "weights", "capacity", "decode step", "estimates", "a million tokens"):
        assert part in said


def test_it_finds_a_slice_that_holds_8x22b_with_its_whole_context() -> None:
    found = plan(
        "--model=mixtral-8x22b-instruct-v0.1",
        "--dtype=int8",
        "--topology=tpu:v5e",
        "--batch=1",
        "--context=65536",
        "--estimate",
        "--json",
    )
    assert (found["topology"], found["fits"]) == ("tpu:v5e:4x4", True)
    assert found["longest_context"] == 65_536


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=gpt-4"], "no model is known as 'gpt-4'; give one of mistral-7b-v0.1"),
        ([], "give either --model NAME or --checkpoint FOLDER"),
        (["--checkpoint=/no/such"], "is not a mixtral-jax checkpoint"),
        (["--model=mixtral-8x7b-v0.1", "--mesh=expert=4"], "for 4 chips, tpu:v5e:2x4 has 8"),
        (["--model=mixtral-8x7b-v0.1", "--mesh=expert=3"], "cannot be split 3 ways"),
        (["--model=mixtral-8x7b-v0.1", "--context=99999"], "longer than the model's 32768"),
        (["--model=mixtral-8x7b-v0.1", "--kv-dtype=int8"], "on TPU it takes more room"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan("--topology=tpu:v5e:2x4", "--estimate", *arguments)


def test_a_missing_compiler_means_arithmetic_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_jax.planning.topology._COMPILERS", {"tpu": ("no_such_compiler",)})
    notes: list[str] = []
    search = Search(load_of(SMALL), "auto", False, 1, notes.append, compiles=True)
    best = search.best_of(topologies("tpu:v5e:2x4"), lambda line: None)[0]
    assert best.method == "arithmetic"
    assert "mixtral-jax[plan]" in notes[0]


def test_a_batch_that_no_split_can_hold() -> None:
    config = replace(DENSE, num_heads=3, num_kv_heads=3, vocab_size=513)
    search = Search(load_of(config, batch=1), "auto", False, 1, print, compiles=False)
    with pytest.raises(ConfigError, match="cannot be split over 8 chips"):
        search.best_of(topologies("cpu:8"), lambda line: None)


@pytest.mark.slow
@pytest.mark.skipif(not installed("tpu"), reason="libtpu is not installed")
def test_mixtral_in_int8_on_eight_small_tpus() -> None:
    """Full size: 32 sequences of 2,048 fit, hardly a byte moves needlessly, and no weight does."""
    found = plan(
        "--model=mixtral-8x7b-instruct-v0.1",
        "--dtype=int8",
        "--topology=tpu:v5e:2x4",
        "--mesh=expert=8",
        "--prefill-tokens=256",
        "--json",
    )
    assert found["method"] == "compiled"
    assert found["fits"]
    assert 1 <= found["bytes_over_least"] <= 1.15
    assert not found["collectives_move_weights"]
    assert "ragged_paged_attention_kernel" in found["kernels"]["decode"]
