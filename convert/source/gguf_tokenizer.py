"""A GGUF file's tokenizer, written as the files that `tokenization.tokenizer.load` reads.

A GGUF file carries its vocabulary, merges, control tokens and chat template as metadata, and of
the pre-tokenizer (the rule that cuts text into words before any merging) only a name. Two names
are known here; under any other the ids would be quietly wrong, so those are refused. What names
and keys mean is defined by llama.cpp's vocabulary loader and the GGUF specification.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

# Keys behind general.sampling, and the names of the same in generation_config.json. A penalty for
# repetition is none of them: llama.cpp's acts on the last tokens only.
_SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type; 1 is a normal token


def write(fields: Mapping[str, object], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into `folder`.

    Args:
        fields: the file's metadata as plain values, which
            `{name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}`
            gives, e.g. {"tokenizer.ggml.model": "gpt2", ...}. Others than the tokenizer's may be
            there; they are not read.
        folder: an existing folder.

    Raises ValueError, saying what to do instead, for a vocabulary that is not byte-level BPE, for
    an unknown pre-tokenizer, and for metadata that is missing or contradicts itself.
    """
    _refuse_others(fields)
    tokens = _strings(fields, "tokenizer.ggml.tokens")
    named = {
        name: token_id
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (token_id := _token_id(fields, key, len(tokens))) is not None
    }
    # An answer ends with eos; some models end a turn or a message with a token of its own.
    ends = [named.get("eos"), *(_token_id(fields, key, len(tokens)) for key in ("eot", "eom"))]
    eos_ids = sorted({end for end in ends if end is not None})
    if not eos_ids:
        raise ValueError("the GGUF file has no tokenizer.ggml.eos_token_id: no answer would end")

    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    config |= {f"{name}_token": tokens[token_id] for name, token_id in named.items()}
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    generation: dict[str, object] = {"eos_token_id": eos_ids}
    if "bos" in named:
        generation["bos_token_id"] = named["bos"]
    for key, name in _SAMPLING.items():
        if f"general.sampling.{key}" in fields:
            generation[name] = fields[f"general.sampling.{key}"]

    _tokenizer(fields, tokens, named).save(str(folder / "tokenizer.json"))
    for name, contents in (("tokenizer", config), ("generation", generation)):
        text = json.dumps(contents, ensure_ascii=False, indent=2) + "\n"
        (folder / f"{name}_config.json").write_text(text, encoding="utf-8")


def _refuse_others(fields: Mapping[str, object]) -> None:
    kind = fields.get("tokenizer.ggml.model")
    if kind == "llama":
        raise ValueError(
            "the GGUF file holds a sentencepiece vocabulary, without the rules that the chat "
            "format needs: place the model's original tokenizer.model beside it"
        )
    if kind != "gpt2":
        raise ValueError(
            f"the GGUF file's tokenizer is {kind!r} where only byte-level BPE ('gpt2') is "
            "supported: place the model's original tokenizer.json beside it"
        )


def _tokenizer(
    fields: Mapping[str, object], tokens: list[str], named: Mapping[str, int]
) -> Tokenizer:
    merges = [merge.split(" ") for merge in _strings(fields, "tokenizer.ggml.merges")]
    types = fields.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError("tokenizer.ggml.token_type has not one entry for each token")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens has the same token twice")

    # No unknown token, whatever the file names: a byte that has no token is dropped, as
    # llama.cpp does, instead of becoming a control token that no one wrote.
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[(first, second) for first, second in merges])
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(fields)
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if fields.get("tokenizer.ggml.add_bos_token") and "bos" in named:
        bos = tokens[named["bos"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, named["bos"])]
        )
    return tokenizer


def _pre_tokenizer(fields: Mapping[str, object]) -> pre_tokenizers.PreTokenizer:
    """The rule behind the name `tokenizer.ggml.pre`."""
    name = fields.get("tokenizer.ggml.pre")
    space_first = bool(fields.get("tokenizer.ggml.add_space_prefix", False))
    # With its own expression switched on, this is the rule of GPT-2.
    words = pre_tokenizers.ByteLevel(add_prefix_space=space_first, use_regex=True)
    if name == "gpt-2":
        return words
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    raise ValueError(
        f"the GGUF file names the pre-tokenizer {name!r} (tokenizer.ggml.pre), and only 'gpt-2' "
        "and 'smollm' are known here: place the model's original tokenizer.json beside it"
    )


def _strings(fields: Mapping[str, object], name: str) -> list[str]:
    strings = fields.get(name)
    if not isinstance(strings, list) or not strings:
        raise ValueError(f"the GGUF file has no {name}")
    return strings


def _token_id(fields: Mapping[str, object], name: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = fields.get(key)
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < num_tokens:
        raise ValueError(f"{key} is {token_id}, of {num_tokens} tokens")
    return token_id
