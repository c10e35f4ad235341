"""How many steps a function call takes when its grammar forces half of its tokens."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from mixtral_jax.sampling_params import SamplingParams
from mixtral_jax.step.inputs import mask_words
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.tool_grammar import Mode, ToolUse
from mixtral_jax.tokenization.mistral import MistralTokenizer
from serving.engine.device import Masks
from serving.engine.engine import Engine
from serving.engine.grammars import Grammars
from serving.scheduling.request import Drawn, Request
from serving.scheduling.step_plan import Limits, StepPlan
from tests.support.forms import ids, served
from tests.support.tokenizers import MISTRAL_FILES
from tests.support.tools import TOOLS, asked, called_ids

LIMITS = Limits(
    num_pages=999,
    page_size=16,
    max_sequences=32,
    max_step_tokens=512,
    max_context=512,
    max_waiting=99,
)
PATIENCE = 60.0  # seconds; a late mask takes a step more, and a busy machine makes masks late


@pytest.fixture(scope="module")
def tokenizer() -> MistralTokenizer:
    return MistralTokenizer(MISTRAL_FILES["v3"])


@pytest.fixture(scope="module")
def compiler(tokenizer: MistralTokenizer) -> Iterator[Compiler]:
    with Compiler(tokenizer, tokenizer.vocab_size, processes=0) as compiler:
        yield compiler


@dataclass
class CallingDevice:
    """Draws the ids of one answer, whatever is asked, where the masks allow them."""

    answer: Sequence[int]
    plans: list[StepPlan] = field(default_factory=list)  # of all steps
    num_partitions = 1

    def launch(self, plans: Sequence[StepPlan]) -> "CallingDevice":
        return self.draw(self.walk(plans), None)

    def walk(self, plans: Sequence[StepPlan]) -> StepPlan:
        self.plans += plans
        return self.plans[-1]

    def draw(self, walked: StepPlan, masks: Masks | None) -> "Answered":
        rows = None if masks is None else masks.allowed[0]
        drawn: list[Drawn | None] = []
        for i, chunk in enumerate(walked.chunks):
            place = chunk.end - chunk.prompt_length
            if not chunk.samples or place >= len(self.answer):
                # It draws nothing, or has ended when the step before is read.
                drawn.append(Drawn(token_id=0) if chunk.samples else None)
                continue
            token = self.answer[place]
            if rows is not None:
                assert rows[i, token // 32] >> np.int32(token % 32) & 1
            drawn.append(Drawn(token_id=token))
        return Answered(drawn)


@dataclass
class Answered:
    """A step that was computed."""

    rows: list[Drawn | None]

    def drawn(self) -> list[list[Drawn | None]]:
        return [self.rows]


@dataclass
class Course:
    """How an engine has computed so many equal answers at once."""

    num_steps: int  # of the engine, that of the prompts among them
    own_steps: int  # of these, those that computed for the first answer
    forced: list[bool]  # of each token of the first answer


def course(tokenizer: MistralTokenizer, form: Form | None, answer: list[int], count: int) -> Course:
    prompt = tuple(tokenizer.chat(asked()[:1], tools=TOOLS))
    device = CallingDevice(answer)
    engine = Engine(device, LIMITS, masks=Grammars(mask_words(tokenizer.vocab_size), PATIENCE))
    requests = [
        Request(
            id=str(i),
            prompt_ids=prompt,
            sampling=SamplingParams(),
            max_tokens=len(answer) + 1,
            eos_ids=frozenset(tokenizer.eos_ids),
            form=form,
        )
        for i in range(count)
    ]
    events = served(engine, *requests)
    assert all(ids(of_choice) == answer for of_choice in events.values())
    assert len(events) == count
    first = events["0", 0]
    forced = [event.drawn.forced for event in first if event.drawn is not None]
    return Course(len(device.plans), first[-1].steps, forced)


@pytest.mark.parametrize("mode", [Mode.AUTO, Mode.REQUIRED])
def test_a_run_of_forced_tokens_takes_one_step(
    tokenizer: MistralTokenizer, compiler: Compiler, mode: Mode
) -> None:
    """Two calls as mistral-common writes them. Each run of forced tokens follows a step that was
    walked before they were known, and whose draw is passed over; then all of them are computed in
    one step, which draws the token behind them. So a run of k saves k - 1 steps, and the last run
    all of its own, as nothing is behind it."""
    answer = [*called_ids(tokenizer, "Rome", "sum"), *tokenizer.eos_ids]
    form = compiler.compile(ToolUse(tokenizer.tool_form, TOOLS, mode), continues=False, salt=b"")
    plain = course(tokenizer, None, answer, 1)
    assert plain.own_steps == len(answer) == 76 and not any(plain.forced)
    held = course(tokenizer, form, answer, 1)
    assert sum(held.forced) >= len(answer) / 2
    runs = [len([*run]) for is_forced, run in itertools.groupby(held.forced) if is_forced]
    assert held.own_steps == len(answer) - sum(runs) + len(runs) - 1
    assert held.own_steps <= 0.6 * plain.own_steps


def test_forced_tokens_fill_free_rows_and_cost_a_full_batch_nothing(
    tokenizer: MistralTokenizer, compiler: Compiler
) -> None:
    """A step of answers alone has no more tokens than there are rows: where all are taken, forced
    tokens are computed one by one, as drawn ones are."""
    answer = [*called_ids(tokenizer, "Rome"), *tokenizer.eos_ids]
    form = compiler.compile(ToolUse(tokenizer.tool_form, TOOLS), continues=False, salt=b"")
    half, full = LIMITS.max_sequences // 2, LIMITS.max_sequences
    half_of_them = course(tokenizer, form, answer, half).num_steps
    assert half_of_them <= 0.8 * course(tokenizer, None, answer, half).num_steps
    all_of_them = course(tokenizer, form, answer, full).num_steps
    assert all_of_them <= course(tokenizer, None, answer, full).num_steps
