"""Special tokens and the chat template as the JSON files beside a tokenizer describe them.

transformers spreads these facts over several files, and each publisher leaves other files out:
`tokenizer_config.json` and `special_tokens_map.json` name the special tokens,
`generation_config.json` or else `config.json` lists the ids that end an answer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.errors import TokenizerError

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_MODEL_CONFIG = "config.json"
# The tokens that transformers names. Other fields ending in "_token", such as add_bos_token, are
# no tokens.
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def read_text(path: Path) -> str:
    """Return the text of a file. Raises TokenizerError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} where there is no such file.

    Raises TokenizerError where the file holds anything else.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # such as an integer of 5000 digits
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds no JSON object")
    return content


def template_source(folder: Path) -> str | None:
    """Return the source of the chat template: its own file, else `tokenizer_config.json`'s."""
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        return read_text(file)
    templates = read_object(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(templates, list):
        named = [entry for entry in templates if isinstance(entry, dict)]
        defaults = [entry.get("template") for entry in named if entry.get("name") == "default"]
        templates = defaults[-1] if defaults else None
    if templates is not None and not isinstance(templates, str):
        raise TokenizerError(f"chat_template in {folder / TOKENIZER_CONFIG} is no text")
    return templates


def named_tokens(folder: Path) -> dict[str, str]:
    """Return bos_token, eos_token and the like, as text by name.

    `special_tokens_map.json` comes before `tokenizer_config.json`, except where the latter lists
    all added tokens itself (`added_tokens_decoder`); this is the order of transformers. Raises
    TokenizerError for a token that is neither text, nor an object with its text, nor null.
    """
    config = read_object(folder / TOKENIZER_CONFIG)
    special = read_object(folder / SPECIAL_TOKENS_MAP)
    in_order = [(TOKENIZER_CONFIG, config), (SPECIAL_TOKENS_MAP, special)]
    if "added_tokens_decoder" in config:
        in_order.reverse()
    named: dict[str, str] = {}
    for file, content in in_order:
        for name, token in content.items():
            text = _token_text(token)
            if name.endswith("_token") and text is not None:
                named[name] = text
            elif name in _NAMES and token is not None:
                raise TokenizerError(
                    f"{name} in {folder / file} is {token!r}: it must be the token's text, an "
                    'object such as {"content": "</s>"}, or null'
                )
    return named


def extra_special_tokens(folder: Path) -> set[str]:
    """Return the special tokens that the two files list without a name.

    Raises TokenizerError for a list that holds anything but tokens.
    """
    texts: set[str] = set()
    for file in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP):
        content = read_object(folder / file)
        for field in ("additional_special_tokens", "extra_special_tokens"):
            tokens = content.get(field)
            if isinstance(tokens, Mapping):
                tokens = list(tokens.values())
            listed = [_token_text(token) for token in tokens] if isinstance(tokens, list) else None
            if tokens is not None and (listed is None or None in listed):
                raise TokenizerError(
                    f"{field} in {folder / file} is {tokens!r}: it must list tokens, each as text "
                    'or as an object such as {"content": "<tool>"}'
                )
            texts.update(text for text in listed or () if text is not None)
    return texts


def eos_ids(folder: Path, vocab_size: int | None = None) -> frozenset[int]:
    """Return the ids that end an answer, as `generation_config.json` or `config.json` lists them.

    The second file is read only where the first lists none. Raises TokenizerError for a list
    that holds anything but ids, or an id that is not below `vocab_size`, the tokenizer's.
    """
    for file in (GENERATION_CONFIG, _MODEL_CONFIG):
        listed = read_object(folder / file).get("eos_token_id")
        if listed is None:
            continue
        ids = listed if isinstance(listed, list) else [listed]
        if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
            raise TokenizerError(
                f"eos_token_id in {folder / file} is {listed!r}: it must be an id or a list of ids"
            )
        if vocab_size is not None and max(ids, default=0) >= vocab_size:
            raise TokenizerError(
                f"eos_token_id in {folder / file} is {listed!r}, and the tokenizer has no id above "
                f"{vocab_size - 1}: correct it"
            )
        if ids:
            return frozenset(ids)
    return frozenset()


def _token_text(token: object) -> str | None:
    """Return the text of a token, which these files write as text or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None
