"""Use of tools: the tools of a chat of the wire, and how its answer may call them.

A mistake in them is named by its field and, within a tool's parameters, by its JSON pointer.
"""

from collections.abc import Callable

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.form import Form
from mixtral_jax.structure.specification import Check, Specification
from mixtral_jax.structure.tool_grammar import OF_RESPONSE, Mode, ToolUse
from mixtral_jax.tokenization.messages import Message, Tool, ToolCall
from mixtral_jax.tokenization.tool_form import ToolForm
from serving.errors import InvalidParameter
from serving.proto import inference_pb2 as pb

FIELD = "response_format"
Checks = Callable[[str, Check], str | None]
"""Returns what is wrong with a JSON text under a schema, or None."""
TOOLS, TOOL_CHOICE = "chat.tools", "chat.tool_choice"
_MODES = {
    pb.ToolChoice.MODE_UNSPECIFIED: Mode.AUTO,
    pb.ToolChoice.MODE_AUTO: Mode.AUTO,
    pb.ToolChoice.MODE_NONE: Mode.NONE,
    pb.ToolChoice.MODE_REQUIRED: Mode.REQUIRED,
}


def messages_of(chat: pb.Chat) -> list[Message]:
    """Returns the messages of a chat as tokenizers read them."""
    messages: list[Message] = []
    for given in chat.messages:
        message: Message = {"role": given.role, "content": given.content}
        if given.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "name": call.name, "arguments": call.arguments}
                for call in given.tool_calls
            ]
        if given.tool_call_id:
            message["tool_call_id"] = given.tool_call_id
        messages.append(message)
    return messages


def tools_of(chat: pb.Chat) -> tuple[Tool, ...]:
    """Returns the tools of a chat as tokenizers read them."""
    return tuple(
        Tool(tool.name, tool.description, tool.parameters, tool.strict) for tool in chat.tools
    )


def has_tools(chat: pb.Chat) -> bool:
    """Returns whether a chat says something of tools for its answer."""
    return bool(chat.tools) or chat.HasField("tool_choice")


def use_of(chat: pb.Chat, form: ToolForm, response: Specification | None) -> ToolUse:
    """Returns how the answer to a chat may call tools; raises InvalidParameter.

    Args:
        chat: Of the wire.
        form: The model's form of calls.
        response: What an answer that calls nothing must match.
    """
    choice = chat.tool_choice
    if choice.mode not in _MODES:
        raise InvalidParameter(f"{TOOL_CHOICE}.mode is {choice.mode}; give one of ToolChoice.Mode")
    parallel = not form.one_unless_asked
    if chat.HasField("parallel_tool_calls"):
        parallel = chat.parallel_tool_calls
    return ToolUse(
        form=form,
        tools=tools_of(chat),
        mode=_MODES[choice.mode],
        allowed=tuple(choice.allowed),
        parallel=parallel,
        response=response,
    )


def is_held(use: ToolUse) -> bool:
    """Returns whether tools ask anything of an answer.

    Without any that may be called, its prompt may show some, which the model must not call.

    Raises StructureError as `ToolUse.callable_tools` does.
    """
    return bool(use.callable_tools()) or (bool(use.tools) and use.response is None)


def field_of_response(response: Specification) -> str:
    """Returns the name of the field that a specification was read from."""
    return f"{FIELD}.{response.kind.value}"


def field_of(error: StructureError, use: ToolUse) -> str:
    """Returns the name of the field that a refusal of the tools is about."""
    if str(error).startswith("tool_choice"):
        return TOOL_CHOICE
    if str(error).startswith(f"{OF_RESPONSE}:") and use.response is not None:
        return field_of_response(use.response)
    for place, tool in enumerate(use.tools):
        if str(error).startswith(f"parameters of the function {tool.name}:"):
            return f"{TOOLS}.{place}.parameters"
    return TOOLS


def text_check(form: Form, run: Checks) -> Callable[[str], str | None] | None:
    """Returns a check of whole texts against a schema of which a part is not enforced.

    It returns what is wrong with a text, or None. None instead of it if all is enforced.

    Args:
        form: The form.
        run: Checks a JSON text, and returns what is wrong with it, or None.
    """
    check = next((check for check in form.checks if not check.tool), None)
    return None if check is None else lambda text: run(text, check)


def call_check(form: Form, run: Checks) -> Callable[[ToolCall], str | None] | None:
    """Returns a check of calls against what of their tools' parameters is not enforced.

    It returns what is wrong with a call, or None. None instead of it if all is enforced.

    Args:
        form: The form.
        run: Checks a JSON text, and returns what is wrong with it, or None.
    """
    checks = {check.tool: check for check in form.checks if check.tool}

    def violation(call: ToolCall) -> str | None:
        check = checks.get(call["name"])
        if check is None:
            return None
        wrong = run(call["arguments"], check)
        return None if wrong is None else f"{call['name']}: {wrong}"

    return violation if checks else None
