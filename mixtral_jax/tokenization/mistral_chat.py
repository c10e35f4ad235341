"""Chats in Mistral's formats, with tools, by mistral-common, which defines those formats.

mistral-common has checks beside the formats. They refuse histories that clients send every day
(calls without results, text beside calls, ids of other vendors), so the checks here are our own.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixtral_jax.errors import ChatError
from mixtral_jax.tokenization.messages import Message, Tool, ToolCall, checked_tools, parsed_json
from mixtral_jax.tokenization.tool_form import Slot, ToolForm

if TYPE_CHECKING:
    from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    Model = Tekkenizer | SentencePieceTokenizer

_CHAT_RULES = (
    "A chat for this model ends with a user message or the result of a tool, and has no system "
    "message right after an assistant's or a tool's"
)
NOT_CUT = "cannot be cut into tokens, perhaps for a very long run of white space"


class MistralChat:
    """Renders chats in the format of a tokenizer's version. Thread-safe."""

    def __init__(self, model: "Model") -> None:
        self._format: InstructTokenizerBase[Any, Any, Any] = _format(model)
        self._normalizer = _normalizer(model)
        self._version = model.version.value

    def ids(
        self,
        messages: Sequence[Message],
        *,
        continue_last: bool = False,
        closes_last: bool = False,
        tools: Sequence[Tool],
    ) -> list[int]:
        """Return the ids of a chat that `checked` has returned. Raises ChatError.

        The last message is a user's or a tool's; with `continue_last` the beginning of an answer,
        and with `closes_last` a whole answer.

        In v2 and v3 a message has text or calls: beside calls its text is left out. In v2 each call
        has a turn of its own, because one turn has one result. Empty assistant messages are left
        out in all versions.
        """
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
        from mistral_common.protocol.instruct.tool_calls import Tool as FormatTool

        chat = [m for m in messages if m["role"] != "assistant" or _says_something(m)]
        _check_order(chat, has_answer=continue_last or closes_last)
        if self._version == "v2":
            chat = _one_call_a_turn(chat)
        try:
            request: ChatCompletionRequest[Any] = ChatCompletionRequest(
                messages=self._turns(chat, continue_last=continue_last),
                tools=[
                    FormatTool.model_validate({"type": "function", "function": function})
                    for function in checked_tools(tools)
                ]
                or None,
            )
            normal: InstructRequest[Any, Any] = self._normalizer.from_chat_completion_request(
                request
            )
            ids: list[int] = self._format.encode_instruct(normal).tokens
            return ids
        except MistralCommonException as error:
            raise ChatError(f"{error}. {_CHAT_RULES}") from error
        except ChatError:
            raise
        except ValueError as error:
            raise ChatError(f"a message {NOT_CUT}: {error}") from error

    def _turns(self, chat: Sequence[Message], *, continue_last: bool) -> list[Any]:
        """Return the messages as mistral-common's."""
        from mistral_common.protocol.instruct import messages as turns

        made: list[Any] = []
        is_early = self._version in ("v1", "v2", "v3")
        drops_text = _drops_text(chat) if is_early else [False] * len(chat)
        for place, message in enumerate(chat):
            content = message["content"]
            match message["role"]:
                case "system":
                    made.append(turns.SystemMessage(content=content))
                case "user":
                    made.append(turns.UserMessage(content=content))
                case "tool":
                    made.append(
                        turns.ToolMessage(
                            # Later versions put results in as text, whatever they are.
                            content=_shielded(content) if is_early else content,
                            tool_call_id=message["tool_call_id"],
                            name=message["name"],
                        )
                    )
                case _:
                    calls = [_call(call) for call in message.get("tool_calls", ())]
                    if drops_text[place] and not calls:
                        continue
                    made.append(
                        turns.AssistantMessage(
                            content=None if drops_text[place] else content,
                            tool_calls=calls or None,
                            prefix=continue_last and place == len(chat) - 1,
                        )
                    )
        return made


def call_form(model: "Model", version: str, *, dummy_space: bool) -> ToolForm | None:
    """Return how the models of a version write calls; None for v1, which has no form for them.

    v2: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`; v3 and v7 the same with `"id"` last;
    v11: `[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}` for each call; v13 without the id.
    """
    from mistral_common.tokens.tokenizers.base import SpecialTokens

    if version == "v1":
        return None
    trigger = model.get_special_token(SpecialTokens.tool_calls.value)
    if version in ("v11", "v13"):
        arguments = model.get_special_token(SpecialTokens.args.value)
        call: tuple[str | int | Slot, ...] = (trigger, Slot.NAME, arguments, Slot.ARGUMENTS)
        if version == "v11":
            number = model.get_special_token(SpecialTokens.call_id.value)
            call = (trigger, Slot.NAME, number, Slot.ID, arguments, Slot.ARGUMENTS)
        return ToolForm(call, text_may_precede=True)
    fields = ('{"name": "', Slot.NAME, '", "arguments": ', Slot.ARGUMENTS)
    return ToolForm(
        call=(*fields, "}") if version == "v2" else (*fields, ', "id": "', Slot.ID, '"}'),
        begin=(trigger, " [" if dummy_space else "["),
        separator=(", ",),
        end=("]",),
        at_most_one=version == "v2",
        text_may_precede=True,
    )


def _says_something(message: Message) -> bool:
    return bool(message["content"] or message.get("tool_calls"))


def _check_order(chat: Sequence[Message], *, has_answer: bool) -> None:
    """Raise ChatError for an order of roles that mistral-common refuses."""
    roles = [message["role"] for message in chat]
    wrong = next(
        (
            f"a system message follows the {before}'s"
            for before, after in zip(roles, roles[1:], strict=False)
            if after == "system" and before in ("assistant", "tool")
        ),
        None,
    )
    if not roles:
        wrong = "it has nothing but empty messages"
    elif roles[-1] == "assistant" and not has_answer:
        wrong = "it ends with an assistant's message"
    elif roles == ["assistant"]:
        wrong = "it begins with an assistant's message"
    if wrong:
        raise ChatError(f"this chat cannot be answered: {wrong}. {_CHAT_RULES}")


def _drops_text(chat: Sequence[Message]) -> list[bool]:
    """Return for each message whether its text is left out, because it calls or a neighbour does.

    Neighbouring messages of an assistant are one turn.
    """
    drops = [False] * len(chat)
    start = 0
    for place in range(len(chat) + 1):
        if place == len(chat) or chat[place]["role"] != "assistant":
            run = range(start, place)
            if any(chat[other].get("tool_calls") for other in run):
                for other in run:
                    drops[other] = True
            start = place + 1
    return drops


def _one_call_a_turn(chat: Sequence[Message]) -> list[Message]:
    """Return the messages with each call followed by its result, where one message has several."""
    made: list[Message] = []
    place = 0
    while place < len(chat):
        message = chat[place]
        place += 1
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            made.append(message)
            continue
        results: dict[str, list[Message]] = {}
        while place < len(chat) and chat[place]["role"] == "tool":
            results.setdefault(chat[place]["tool_call_id"], []).append(chat[place])
            place += 1
        for call in calls:
            made.append({"role": "assistant", "content": "", "tool_calls": [call]})
            made += results.pop(call["id"], [])[:1]
        made += [result for late in results.values() for result in late]
    return made


def _shielded(text: str) -> str:
    """Return text that mistral-common's parser of JSON reads as the value that we read in it.

    Of text that it would fail on, that value is the text itself.
    """
    value = parsed_json(text)
    if value is not text:
        return text
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return text  # it is put in as text
    except (ValueError, RecursionError):
        pass
    return json.dumps(text)


def _call(call: ToolCall) -> Any:
    """Return a call as mistral-common's."""
    from mistral_common.protocol.instruct import tool_calls

    function = tool_calls.FunctionCall(name=call["name"], arguments=_shielded(call["arguments"]))
    return tool_calls.ToolCall(id=call["id"], function=function)


def _format(model: "Model") -> "InstructTokenizerBase[Any, Any, Any]":
    from mistral_common.tokens.tokenizers import instruct

    formats: dict[str, Any] = {
        "v1": instruct.InstructTokenizerV1,
        "v2": instruct.InstructTokenizerV2,
        "v3": instruct.InstructTokenizerV3,
        "v7": instruct.InstructTokenizerV7,
        "v11": instruct.InstructTokenizerV11,
        "v13": instruct.InstructTokenizerV13,
    }
    made: InstructTokenizerBase[Any, Any, Any] = formats[model.version.value](model)
    return made


def _normalizer(model: "Model") -> "InstructRequestNormalizer[Any, Any, Any, Any, Any]":
    from mistral_common.protocol.instruct import normalize

    return normalize.get_normalizer(model.version, None)
