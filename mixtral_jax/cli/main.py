"""The command `mixtral-jax`: its commands, the flags of all of them, and how errors are shown."""

import logging
import os
import sys

import typer

from mixtral_jax.cli import adapter, bench, chat, convert, extras, keys, plan, serve
from mixtral_jax.cli.train.command import train
from mixtral_jax.errors import UserError
from serving.command_line import INTERRUPTED, USER_ERRORS, flags_of_all, run

# Heavy imports stand inside the commands: `--help` should not wait for a compiler to load.

app = typer.Typer(
    help="Mistral-7B and Mixtral in JAX: convert, look at, chat with and serve them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (
    *(convert.pull, convert.convert, convert.export, convert.info, chat.chat),
    *(adapter.merge, adapter.export_adapter),
    *(extras.needs("serve")(serve.serve), train, plan.plan, bench.bench),
):
    app.command()(_command)
app.add_typer(keys.app, name="keys")
app.callback()(flags_of_all)


def _kernels() -> str:
    """The line of --version that names the CPU kernels which run here."""
    from mixtral_jax.kernels.cpu import build

    return f"kernels for CPU: {build.description()}"


def main() -> None:
    """Runs the command and ends the process with its status."""
    logging.basicConfig(level=logging.WARNING, format="mixtral-jax: %(message)s")
    status = run(app, errors=(UserError, *USER_ERRORS), about=_kernels)
    if status == INTERRUPTED:
        # XLA's threads may still compute, and an interpreter that takes their memory away crashes
        # or waits for ever. Everything that had to be put away is.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
