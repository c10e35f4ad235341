"""Any history with calls renders in every format, and its texts become text only."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mixtral_jax.tokenization.messages import Message, ToolCall
from mixtral_jax.tokenization.tokenizer import Tokenizer
from tests.support.tokenizers import ATTACKS, control_ids, each
from tests.support.tools import TOOLS

TEXT = st.sampled_from(["", " ", "yes", "你好 🙂", '{"a": 1}', "[[", *ATTACKS])
IDS = st.sampled_from(["", "abcDEF123", "call_1", "call_2", "null", "toolu_01A09q", "日本"])
ARGUMENTS = st.sampled_from(["", "{}", '{"city": "Rome"}', '{"ci', "null", "[1]", *ATTACKS])
CALL = st.fixed_dictionaries(
    {
        "id": IDS,
        "name": st.sampled_from(["add", "get_weather", "gone.tool"]),
        "arguments": ARGUMENTS,
    }
)


class Histories(RuleBasedStateMachine):
    """A chat that grows as agents' chats do."""

    tokenizer: Tokenizer
    chat: list[Message]
    open_ids: list[str]

    @initialize(system=st.none() | TEXT)
    def begin(self, system: str | None) -> None:
        self.chat = [] if system is None else [{"role": "system", "content": system}]
        self.open_ids = []

    @rule(text=TEXT)
    def ask(self, text: str) -> None:
        self.chat.append({"role": "user", "content": text})

    @precondition(lambda self: self.chat and self.chat[-1]["role"] in ("user", "tool"))
    @rule(text=TEXT)
    def answer(self, text: str) -> None:
        self.chat.append({"role": "assistant", "content": text})

    @precondition(lambda self: self.chat and self.chat[-1]["role"] in ("user", "tool"))
    @rule(text=TEXT, calls=st.lists(CALL, min_size=1, max_size=3))
    def call(self, text: str, calls: list[ToolCall]) -> None:
        self.chat.append({"role": "assistant", "content": text, "tool_calls": calls})
        self.open_ids = [call["id"] for call in calls]

    @precondition(lambda self: self.open_ids)
    @rule(text=TEXT, data=st.data())
    def give_result(self, text: str, data: st.DataObject) -> None:
        call_id = data.draw(st.sampled_from(self.open_ids))
        self.open_ids.remove(call_id)
        self.chat.append({"role": "tool", "content": text, "tool_call_id": call_id})

    @invariant()
    def renders(self) -> None:
        if not self.chat or self.chat[-1]["role"] not in ("user", "tool"):
            return
        ids = self.tokenizer.chat(self.chat, tools=TOOLS)
        plain = self.tokenizer.chat(list(map(harmless, self.chat)), tools=TOOLS)
        assert control_ids(self.tokenizer, ids) == control_ids(self.tokenizer, plain)


def harmless(message: Message) -> Message:
    """The same message with other texts; the empty ones stay."""
    made: Message = {**message, "content": "x" if message["content"] else ""}
    if calls := message.get("tool_calls"):
        made["tool_calls"] = [{**call, "name": "f", "arguments": "{}"} for call in calls]
    return made


@each
def test_histories_render_and_hold_no_control_ids_of_outside_text(
    name: str, all_tokenizers: dict[str, Tokenizer], request: pytest.FixtureRequest
) -> None:
    machine = type("Machine", (Histories,), {"tokenizer": all_tokenizers[name]})
    case = machine.TestCase
    case.settings = settings(max_examples=15, stateful_step_count=8, deadline=None)
    case("runTest").runTest()
