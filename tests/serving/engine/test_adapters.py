"""An engine with adapters gives what the plain loop gives for the models that they stand for."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint.adapter import StoredAdapter, write_adapter
from mixtral_jax.compilation import CompilationCount
from mixtral_jax.errors import AdapterError
from mixtral_jax.generation import generate_tokens
from mixtral_jax.hf_config import from_hf
from mixtral_jax.model.adapter import Adapter, AdapterConfig
from mixtral_jax.model.adapter_stack import StackSizes
from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.buckets import Steps
from serving.engine.adapters import AdapterLoader, AdapterSlots, SlotsBusy
from serving.engine.build import compile_steps, engine_of
from serving.engine.device import PutLayer
from serving.engine.engine import Engine
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.errors import ModelNotFound
from serving.scheduling.request import FinishReason, Priority, Request, Seat
from serving.scheduling.step_plan import Limits
from tests.support import sources
from tests.support.adapters import random_adapter
from tests.support.merged_models import merged_model
from tests.support.models import model_of

CONFIGS = {"dense": from_hf(sources.DENSE), "moe": from_hf(sources.MOE)}
LIMITS = Limits(
    num_pages=16,
    page_size=4,
    max_sequences=4,
    max_step_tokens=8,
    max_context=32,
    max_waiting=99,
)
SETTINGS = {
    "red": AdapterConfig(rank=4, alpha=8.0),
    "blue": AdapterConfig(targets=("q", "v", "gate", "up", "down"), rank=2, alpha=8.0),
    "green": AdapterConfig(targets=("o",), rank=1, alpha=4.0),
}
PROMPT = (5, 6, 7, 8, 9, 10, 11, 12, 13)


@cache
def stored(kind: str, name: str) -> StoredAdapter:
    settings = SETTINGS[name]
    adapter = random_adapter(CONFIGS[kind], settings, seed=len(name), size=0.3)
    return StoredAdapter(settings, adapter, name.encode().hex().ljust(64, "0"), "base")


@cache
def steps_of(kind: str) -> Steps:
    config = CONFIGS[kind]
    sizes = StackSizes(slots=2, rank=4, targets=("q", "k", "v", "o", "gate", "up", "down"))
    return compile_steps(model_of(config), LIMITS, has_masks=False, adapters=sizes)


def engine_for(kind: str, *names: str) -> Engine:
    engine = engine_of(model_of(CONFIGS[kind]), LIMITS, steps_of(kind))
    for name in names:
        engine.load_adapter(name, stored(kind, name))
    return engine


def request(name: str, adapter: str = "", prompt: tuple[int, ...] = PROMPT) -> Request:
    return Request(
        id=name,
        prompt_ids=prompt,
        sampling=SamplingParams(temperature=0.0),
        max_tokens=8,
        eos_ids=frozenset(),
        adapter=adapter,
    )


def answers(engine: Engine, *requests: Request) -> dict[str, list[int]]:
    for asked in requests:
        engine.add(asked)
    tokens = defaultdict[str, list[int]](list)
    while engine.has_work:
        for event in engine.step():
            if event.drawn is not None:
                tokens[event.request_id].append(event.drawn.token_id)
    return tokens


@cache
def expected(kind: str, adapter: str) -> list[int]:
    model = model_of(CONFIGS[kind])
    if adapter:
        kept = stored(kind, adapter)
        model = merged_model(CONFIGS[kind], kept.adapter, kept.settings)
    return list(generate_tokens(model, PROMPT, max_tokens=8))


@pytest.mark.parametrize("kind", [pytest.param("dense", marks=pytest.mark.soak), "moe"])
def test_adapters_and_the_base_share_steps(kind: str) -> None:
    """More requests than rows, so that some wait."""
    names = ("", "red", "blue")
    assert len({tuple(expected(kind, name)) for name in names}) == 3
    engine = engine_for(kind, "red", "blue")
    asked = [request(f"{name}-{i}", name) for i in range(3) for name in names]
    for name, tokens in answers(engine, *asked).items():
        assert tokens == expected(kind, name.partition("-")[0]), name
    for name in names:
        assert answers(engine, request("alone", name))["alone"] == expected(kind, name)


def test_a_row_that_gave_way_goes_on_with_its_adapter() -> None:
    engine = engine_for("dense", "red", "blue")
    for adapter in ("red", "blue", "", "red"):
        early = request(f"{adapter}-early-{engine.scheduler.num_waiting}", adapter)
        engine.add(replace(early, priority=Priority.BATCH))
    tokens = defaultdict[str, list[int]](list)
    for _ in range(6):
        for event in engine.step():
            if event.drawn is not None:
                tokens[event.request_id].append(event.drawn.token_id)
    late = [request(f"{adapter}-late", adapter) for adapter in ("blue", "", "red")]
    for name, others in answers(engine, *late).items():
        tokens[name] += others
    assert engine.scheduler.preemptions == 3
    assert len(tokens) == 7
    for name, drawn in tokens.items():
        assert drawn == expected("dense", name.partition("-")[0]), name


def test_a_prefix_is_found_under_its_adapter_alone() -> None:
    engine = engine_for("dense", "red", "blue")
    hits = []
    for adapter in ("red", "blue", "", "red", "blue", ""):
        before = engine.scheduler.prefix_hit_tokens
        answers(engine, request("one", adapter))
        hits.append(engine.scheduler.prefix_hit_tokens - before)
    assert hits == [0, 0, 0, 8, 8, 8]
    engine.adapters.unload("red")
    engine.load_adapter("red", stored("dense", "green"))  # another version of the name
    before = engine.scheduler.prefix_hit_tokens
    assert answers(engine, request("one", "red"))["one"] == expected("dense", "green")
    assert engine.scheduler.prefix_hit_tokens == before


def test_a_salt_and_a_digest_cannot_be_mistaken_for_one_another() -> None:
    seat = Seat(0, b"ab")
    salts = {
        Request(
            id="r",
            prompt_ids=(1,),
            sampling=SamplingParams(),
            max_tokens=1,
            eos_ids=frozenset(),
            salt=salt,
            seat=where,
        ).prefix_salt
        for salt, where in [(b"", None), (b"", seat), (b"ab", None), (b"ab", seat), (b"\2ab", None)]
    }
    assert len(salts) == 5


def test_an_unloaded_adapter_answers_those_who_had_come() -> None:
    engine = engine_for("dense", "red", "blue")
    slots = engine.adapters
    assert slots is not None
    engine.add(request("early", "red"))
    engine.step()
    slots.unload("red")
    with pytest.raises(ModelNotFound, match="'red' is not loaded any more"):
        engine.add(request("late", "red"))
    with pytest.raises(SlotsBusy):
        engine.load_adapter("green", stored("dense", "green"))
    assert answers(engine)["early"] == expected("dense", "red")
    engine.load_adapter("green", stored("dense", "green"))
    assert answers(engine, request("new", "green"))["new"] == expected("dense", "green")
    assert set(slots.digests) == {"blue", "green"}


def test_a_new_version_takes_another_slot() -> None:
    engine = engine_for("dense", "red")
    engine.add(request("early", "red"))
    engine.load_adapter("red", stored("dense", "blue"))
    tokens = answers(engine, request("late", "red"))
    assert tokens == {"early": expected("dense", "red"), "late": expected("dense", "blue")}


def test_what_has_no_room_is_refused() -> None:
    engine = engine_for("dense", "red", "blue")
    with pytest.raises(AdapterError, match="no room for the adapter 'green': 2 are loaded"):
        engine.load_adapter("green", stored("dense", "green"))
    assert engine.adapters is not None
    with pytest.raises(AdapterError, match="no adapter with the name 'grey'"):
        engine.adapters.unload("grey")
    with pytest.raises(ModelNotFound):
        engine.add(request("r", "grey"))
    plain = engine_of(model_of(CONFIGS["dense"]), LIMITS, steps_of("dense"))
    plain.adapters = None
    with pytest.raises(ModelNotFound):
        plain.add(request("r", "red"))


def test_a_load_that_fails_leaves_the_names_as_they_were() -> None:
    config = CONFIGS["dense"]
    slots = AdapterSlots(config, StackSizes(slots=1, rank=4, targets=("q",)))

    def broken(put: PutLayer) -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        slots.load("red", stored("dense", "red"), lambda slot: False, broken)
    assert not slots.digests


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        kept = stored("dense", name)
        write_adapter(tmp_path / name, kept.adapter, kept.settings, "base")
        return tmp_path / name

    return write


def test_adapters_come_and_go_without_a_compilation(written: Callable[[str], Path]) -> None:
    engine = engine_for("dense")
    worker = EngineWorker(engine, Metrics("tiny"))
    loader = AdapterLoader(engine, worker.call)
    folders = {name: written(name) for name in ("red", "blue", "green")}
    worker.start()
    try:
        with CompilationCount() as count:
            loader.read("red", folders["red"])()
            loader.read("blue", folders["blue"])()
            loader.unload("red")
            loader.read("green", folders["green"])()
        assert count.value == 0
        assert set(loader.digests()) == {"blue", "green"}
        assert all(len(digest) == 64 for digest in loader.digests().values())
        with pytest.raises(AdapterError, match="no room"):
            loader.read("red", folders["red"])()
    finally:
        worker.stop()
    with pytest.raises(Exception, match="stopped"):
        loader.unload("blue")


def test_targets_and_ranks_beyond_the_stacks_are_refused(written: Callable[[str], Path]) -> None:
    narrow = AdapterSlots(CONFIGS["dense"], StackSizes(slots=1, rank=4, targets=("q", "v")))
    with pytest.raises(AdapterError, match=r"changes k, o, gate, up, down, and .* of q, v"):
        narrow.read(written("red"))
    flat = AdapterSlots(CONFIGS["dense"], StackSizes(slots=1, rank=1, targets=("o", "q")))
    with pytest.raises(AdapterError, match="at most 1 is allowed"):
        flat.read(written("blue"))


def test_values_that_overflow_end_their_request_alone() -> None:
    huge = stored("dense", "red")
    layers = tuple(
        type(block)(
            *(low and low._replace(b=np.full_like(low.b, 1e38)) for low in block)  # finite
        )
        for block in huge.adapter.layers
    )
    engine = engine_for("dense")
    engine.load_adapter("huge", replace(huge, adapter=Adapter(layers), settings=SETTINGS["red"]))
    want = answers(engine_for("dense"), request("base"))
    for asked in (request("bad", "huge"), request("base")):
        engine.add(asked)
    failed, tokens = [], []
    while engine.has_work:
        for event in engine.step():
            if event.finish_reason is FinishReason.FAILED:
                failed.append((event.request_id, "not finite" in event.problem))
            elif event.drawn is not None:
                tokens.append((event.request_id, event.drawn.token_id))
    assert failed == [("bad", True)]
    assert tokens == [("base", token) for token in want["base"]]


def test_an_adapter_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    settings = SETTINGS["red"]
    new = Adapter.random(CONFIGS["dense"], settings, jax.random.key(0))  # B is zero
    write_adapter(tmp_path / "new", new, settings, "base")
    slots = AdapterSlots(CONFIGS["dense"], StackSizes.all_targets(CONFIGS["dense"], 2, 4))
    with pytest.raises(AdapterError, match="changes nothing.*trained"):
        slots.read(tmp_path / "new")
