"""Names of parameters in the service's refusals, which become those that the client has used."""

from collections.abc import Callable
from dataclasses import replace

from serving.errors import InvalidParameter, Problem

Path = tuple[str, ...]


def renamed(error: InvalidParameter, rename: Callable[[Path], Path]) -> InvalidParameter:
    """Returns a refusal with other names.

    Args:
        error: The refusal.
        rename: From the service's path of a parameter, such as ("response_format", "regex"), to the
            client's, such as ("guided_regex",).
    """
    problems = [_renamed(problem, rename) for problem in error.problems]
    if problems == list(error.problems):
        return error
    return type(error)("; ".join(problem.message for problem in problems), problems)


def _renamed(problem: Problem, rename: Callable[[Path], Path]) -> Problem:
    own = problem.path[1:]
    # The tools of a request stand in its chat, which no client's API has.
    sent = rename(own[1:] if own[:1] == ("chat",) else own)
    # The service's sentences begin with its own name.
    name, rest = ".".join(own), problem.message
    if own != sent and rest.startswith(name):
        rest = ".".join(sent) + rest.removeprefix(name)
    return replace(problem, path=("body", *sent), message=rest)
