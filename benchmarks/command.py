"""The frame of every benchmark: flags, errors in one line, and no process left behind."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mixtral_jax.errors import UserError
from serving import command_line


def run(main: Callable[..., object], module: str) -> NoReturn:
    """Runs a benchmark and ends this process with its status.

    SIGINT, SIGTERM and SIGHUP end it too, after what it has started.

    Args:
        main: A function whose parameters typer reads as flags.
        module: The benchmark as `python -m` takes it.
    """
    errors: command_line.Errors = (UserError, *command_line.USER_ERRORS)
    with command_line.ended_by_signals():
        status = command_line.run(command_line.app_of(main), None, errors, f"python -m {module}")
    sys.exit(status)


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Puts a text in place of all that stands between two marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")
