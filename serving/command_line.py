"""The frame of every command: flags to parameters, errors to one line, exit status.

    0    the command did its work
    1    an error of the user's, in one line; or a fault of ours, with its traceback
    2    a command line that cannot be read, in one line
    130  interrupted by Ctrl-C

`errors` are the classes whose messages were written for the user; any other exception is a fault
of this program and keeps its traceback.
"""

import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any

import typer

from serving.errors import SetupError
from serving.flags import Flag, secrets

Errors = tuple[type[Exception], ...]

NAME = "mixtral-jax"
FILE_ERRORS: Errors = (FileNotFoundError, FileExistsError, PermissionError)
"""Errors of the operating system that name a file which the user gave."""
USER_ERRORS: Errors = (SetupError, *FILE_ERRORS)
# typer names only this leaf of the errors of its parser.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
INTERRUPTED = 128 + signal.SIGINT
"""The status of a command that was ended by Ctrl-C."""


@dataclass
class Settings:
    """Settings of the frame that a command's own flags may change, as typer's context object."""

    debug: bool = False
    """Show the tracebacks of the user's errors too."""
    about: Callable[[], str] | None = None
    """Returns what --version prints behind the version, in lines of its own."""


def command(run: Callable[[dict[str, Any]], None], flags: Sequence[Flag]) -> Callable[..., None]:
    """Returns a function with a parameter for each flag, from which typer makes a command.

    It calls `run` with the values by the names of the flags, and with the secrets of the
    environment by theirs. The docstring of `run` is the text of the help.
    """

    def called(**given: Any) -> None:
        run({**secrets(os.environ), **given})

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            flag.name,
            keyword,
            annotation=Annotated[flag.type, flag.option()],
            default=inspect.Parameter.empty if flag.default is ... else flag.default,
        )
        for flag in flags
    ]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {item.name: item.annotation for item in parameters}
    called.__name__, called.__doc__ = run.__name__.lstrip("_"), run.__doc__
    return called


def _show_version(context: typer.Context, wanted: bool | None) -> None:
    if wanted:
        print(f"{NAME} {version(NAME)}")
        if about := context.ensure_object(Settings).about:
            print(about())
        raise typer.Exit


def flags_of_all(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the tracebacks of errors in your input too.")
    ] = False,
) -> None:
    """Reads the flags that stand before the name of a command."""
    context.ensure_object(Settings).debug = debug


def app_of(function: Callable[..., Any]) -> typer.Typer:
    """Returns the application of a program that has a single command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    return app


def run(
    app: typer.Typer,
    arguments: Sequence[str] | None = None,
    errors: Errors = USER_ERRORS,
    program: str = NAME,
    about: Callable[[], str] | None = None,
) -> int:
    """Runs an application and returns its exit status.

    Args:
        app: The application.
        arguments: Its command line; by default that of this process.
        errors: Classes of errors whose messages are for the user.
        program: Name of the program in its help.
        about: Returns what --version prints behind the version.
    """
    settings = Settings(about=about)

    def work() -> object:
        return app(arguments, prog_name=program, obj=settings, standalone_mode=False)

    return exit_status(work, errors, settings, program)


def exit_status(
    work: Callable[[], object],
    errors: Errors = USER_ERRORS,
    settings: Settings | None = None,
    program: str = NAME,
) -> int:
    """Calls `work`, prints what went wrong to stderr, and returns the exit status."""
    try:
        status = work()
    except _UsageError as error:
        if text := getattr(error, "format_message", error.__str__)():  # else it is the help
            _say(f"{_one_line(text)} (see {_path_of(error, program)} --help)")
        return 2
    except errors as error:
        if settings is not None and settings.debug:
            traceback.print_exc()
        _say(_text_of(error))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone; a flush at the exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as error:
        if isinstance(error.code, str):
            _say(error.code)
            return 1
        return error.code or 0
    except Exception:
        traceback.print_exc()
        _say("this is a fault of mixtral-jax; please report it together with the lines above")
        return 1
    return status if isinstance(status, int) else 0  # typer returns the status of an early exit


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end the block as Ctrl-C does, so that every `finally` in it runs.

    A second signal ends the process at once, and a signal that is ignored (nohup) stays ignored.
    Works in the main thread only.
    """

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(f"{NAME}: {text}", file=sys.stderr, flush=True)


def _text_of(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _one_line(text: str) -> str:
    return " ".join(text.split()).removesuffix(".")


def _path_of(error: Exception, program: str) -> str:
    """Returns the words of the command whose flags were wrong, such as `mixtral-jax serve`."""
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else program
