"""`mixtral-jax keys`: add, list, remove. Running servers with `--keys FILE` follow the file."""

from pathlib import Path
from typing import Annotated

import typer

from mixtral_jax.paths import settings_folder
from serving.access.keyring import KeyFile

app = typer.Typer(help="Keys of clients, by name; only digests are kept.", no_args_is_help=True)


def default_file() -> Path:
    """Returns `keys.json` in the folder of the user's settings."""
    return settings_folder() / "keys.json"


FileOption = Annotated[
    Path,
    typer.Option("--file", metavar="FILE", default_factory=default_file, help="File of the keys."),
]


@app.command()
def add(name: Annotated[str, typer.Argument(help="Name of a caller.")], file: FileOption) -> None:
    """Make a key, print it, and keep its digest: it cannot be shown again."""
    print(KeyFile(file).add(name))


@app.command("list")
def show(file: FileOption) -> None:
    """Show the names of all keys and when they were made."""
    for key in KeyFile(file).read():
        print(f"{key.name}\t{key.created}")


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Name of a caller.")], file: FileOption
) -> None:
    """Take a key away; running servers refuse it within seconds."""
    KeyFile(file).remove(name)
