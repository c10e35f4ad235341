"""The text that `mixtral-jax serve` prints when it is ready, and where its key is shown.

A key that the operator gave is never printed, because output ends in log files. A key that was made
up for this run is printed to a terminal only; elsewhere it is written to a file of its own.
"""

import json
import shlex
from pathlib import Path

from mixtral_jax.paths import state_folder
from serving.access.key_file import write_private
from serving.errors import SetupError
from serving.flags import KEY_VARIABLE

_BODY = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "stream": True,
}


def banner(url: str, target: str, key: str, bearer: str | None, page: str | None = None) -> str:
    """Returns the addresses, where the key is, and a curl line to paste into a shell.

    Args:
        url: Of HTTP.
        target: HOST:PORT of gRPC.
        key: What to say about the key; empty where there is nothing to say.
        bearer: The key as a shell reads it between double quotes; None: no key is asked for.
        page: URL of the page to chat with; None: it is turned off.
    """
    header = f'-H "Authorization: Bearer {bearer}" ' if bearer else ""
    curl = (
        f"curl -sN {url}/chat/completions {header}-H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(_BODY))}"
    )
    line = f"key   {key}\n" if key else ""
    shown = f"page  {page}\n" if page else ""
    return f"\nHTTP  {url}\ngRPC  {target}\n{shown}{line}\nTry it:\n{curl}\n"


def shown_key(
    key: str | None,
    port: int,
    *,
    is_made_up: bool,
    asks_key: bool,
    has_file: bool,
    is_terminal: bool,
) -> tuple[str, str | None]:
    """Returns what the banner says about the key, and how its curl line presents it.

    A key that was made up is written to a file unless stdout is a terminal. Raises SetupError if it
    cannot be written.

    Args:
        key: The key of the environment, or the one made up; None: there is none.
        port: Port of HTTP, which names the file.
        is_made_up: Whether the key was made for this run.
        asks_key: Whether callers must present a key at all.
        has_file: Whether there is a file of keys; without any key, callers have tokens.
        is_terminal: Whether the banner goes to a terminal.
    """
    if not asks_key:
        return "", None
    if key is None:  # its owner alone knows what to present
        return "", "$KEY" if has_file else "$TOKEN"
    if not is_made_up:
        return f"the one in {KEY_VARIABLE}", f"${KEY_VARIABLE}"
    if is_terminal:
        return key, key
    path = _write_key(key, port)
    return f"in {path}", f"$(cat {shlex.quote(str(path))})"


def _write_key(key: str, port: int) -> Path:
    path = state_folder() / f"key-{port}"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, f"{key}\n")
    except OSError as error:
        raise SetupError(
            f"the key of this run is for no log, and cannot be written to {path}: "
            f"{error.strerror}; set {KEY_VARIABLE} yourself, as `openssl rand -hex 16` prints one"
        ) from None
    return path
