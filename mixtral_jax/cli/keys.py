"""`mixtral-jax keys`: add, rotate, list, remove. Servers with `--keys FILE` follow the file.

Each change leaves a line on stderr that says what was changed and never shows a key, so that a
shell's or a job's log is an audit log.
"""

import re
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from mixtral_jax.paths import settings_folder
from serving.access.caller import CallerLimits
from serving.access.key_file import KeyDigest, KeyFile, Role, StoredKey

app = typer.Typer(
    help="Keys of clients, by name. Only digests are kept: a key is printed once, to stdout.",
    no_args_is_help=True,
)

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def default_file() -> Path:
    """Returns `keys.json` in the folder of the user's settings."""
    return settings_folder() / "keys.json"


def duration(text: str) -> timedelta:
    """Reads a time such as 90d, 12h, 30m or 2w. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d{1,6})([mhdw])", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no time: give a number and m, h, d or w, as in 90d")
    return timedelta(**{_UNITS[match.group(2)]: int(match.group(1))})


def _time_option(explanation: str) -> Any:
    """Returns an option that is a time such as 90d, with that explanation."""
    return typer.Option(parser=duration, metavar="TIME", show_default=False, help=explanation)


NameArgument = Annotated[str, typer.Argument(help="Name of a caller.")]
FileOption = Annotated[
    Path,
    typer.Option("--file", metavar="FILE", default_factory=default_file, help="File of the keys."),
]


@app.command()
def add(
    name: NameArgument,
    file: FileOption,
    role: Annotated[
        Role, typer.Option(help="An operator may also drain servers and read everybody's usage.")
    ] = "user",
    expires: Annotated[
        timedelta | None,
        _time_option("Time after which the key opens nothing, such as 90d or 12h; default: none."),
    ] = None,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Its own limit, instead of the server's."),
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="The same for tokens of prompts and answers."),
    ] = None,
    concurrent: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="The same for requests at the same time."),
    ] = None,
    batch_only: Annotated[
        bool,
        typer.Option("--batch-only", help="Put all its requests behind interactive ones."),
    ] = False,
) -> None:
    """Make a key, print it to stdout, and keep its digest: it cannot be shown again."""
    keys = KeyFile(file)
    limits = CallerLimits(requests_per_minute, tokens_per_minute, concurrent)
    print(keys.add(name, role=role, lifetime=expires, limits=limits, batch_only=batch_only))
    _report("added", name, keys)


@app.command()
def rotate(
    name: NameArgument,
    file: FileOption,
    overlap: Annotated[
        timedelta | None,
        _time_option(
            "Time for which the older key stays valid, such as 7d; default: until "
            "`keys remove NAME --old`."
        ),
    ] = None,
    expires: Annotated[
        timedelta | None,
        _time_option(
            "Time after which the new key opens nothing; default: as long as the older key's."
        ),
    ] = None,
) -> None:
    """Make a second key of a name, and print it to stdout; the older one stays valid."""
    keys = KeyFile(file)
    print(keys.rotate(name, overlap=overlap, lifetime=expires))
    _report("rotated", name, keys)


@app.command("list")
def show(file: FileOption) -> None:
    """Show a line for each key: name, time of making, role, expiry, limits; never the key."""
    for key in KeyFile(file).read():
        for digest in key.digests:
            columns = (key.name, digest.created, key.role, _expiry(digest), _limits(key))
            print("\t".join(columns))


@app.command()
def remove(
    name: NameArgument,
    file: FileOption,
    old: Annotated[
        bool, typer.Option("--old", help="Take the older of its two keys away only.")
    ] = False,
) -> None:
    """Take a name and its keys away; running servers refuse them within seconds."""
    keys = KeyFile(file)
    if old:
        keys.remove_old(name)
        _report("removed the older key of", name, keys)
        return
    keys.remove(name)
    print(f"mixtral-jax: removed {name}; {file}", file=sys.stderr)


def _report(change: str, name: str, file: KeyFile) -> None:
    """Writes what was changed to stderr."""
    for key in file.read():
        if key.name == name:
            print(
                f"mixtral-jax: {change} {name}, {key.role}, expiry {_expiry(key.digests[-1])}, "
                f"limits {_limits(key)}; {file.path}",
                file=sys.stderr,
            )


def _expiry(digest: KeyDigest) -> str:
    if digest.expires is None:
        return "never"
    return f"{digest.expires} (expired)" if digest.has_expired(time.time()) else digest.expires


def _limits(key: StoredKey) -> str:
    limits = key.limits
    named = {
        "requests/min": limits.requests_per_minute,
        "tokens/min": limits.tokens_per_minute,
        "at once": limits.concurrent_requests,
    }
    texts = [f"{number} {what}" for what, number in named.items() if number is not None]
    return ", ".join([*texts, *(["batch only"] if key.batch_only else [])]) or "none"
