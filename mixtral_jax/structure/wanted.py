"""Wanted: whatever an answer can be held to, and its grammar."""

from collections.abc import Callable

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.grammar import check_size, tried_specification
from mixtral_jax.structure.specification import Grammar, Specification
from mixtral_jax.structure.tool_grammar import ToolUse, tried_tools

LARGEST_GRAMMAR = 4 << 20  # characters of one that our own code wrote from what a caller sent

Wanted = Specification | ToolUse | Grammar
"""What a caller asks for, the tools that it may call, or a grammar that our own code wrote."""


def check_wanted(wanted: Wanted) -> None:
    """Raises StructureError for what is empty or too large to be looked at."""
    match wanted:
        case Grammar():
            size = len(wanted.text)
        case ToolUse():
            size = sum(len(tool.parameters) for tool in wanted.tools)
            if wanted.response is not None:
                check_size(wanted.response)
        case Specification():
            check_size(wanted)
            return
    if size > LARGEST_GRAMMAR:
        raise StructureError(
            f"the schemas of all tools have {size} characters; at most {LARGEST_GRAMMAR} are read"
        )


def tried_grammar(wanted: Wanted, *, space: bool, attempt: Callable[[Grammar], object]) -> Grammar:
    """Returns the grammar of what is wanted after it was tried.

    Args:
        wanted: What the answer must match; of tools that may not be called, any text that calls
            none. A grammar is returned as it is.
        space: Whether a space must stand before an answer that begins with text.
        attempt: Compiles a grammar; raises StructureError if it is refused.

    Raises StructureError, with the pointer of the part where that is known.
    """
    check_wanted(wanted)
    match wanted:
        case Specification():
            return tried_specification(wanted, space=space, attempt=attempt)
        case ToolUse():
            return tried_tools(wanted, space=space, attempt=attempt)
        case Grammar():
            attempt(wanted)
            return wanted
