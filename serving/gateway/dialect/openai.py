"""Rules that only OpenAI's API has: its answers' ids, and fields that its types do not have.

Clients of other servers with OpenAI's routes add parameters of their own. One that would change the
answer, and that this server does not have, is refused by name; any other unknown field is ignored.

https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
https://docs.sglang.ai/basic_usage/sampling_params.html
https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
https://learn.microsoft.com/azure/ai-foundry/openai/references/on-your-data
"""

from collections.abc import Collection, Mapping
from typing import Any

from serving.errors import Problem, UnsupportedParameter
from serving.gateway.dialect.fields import NOT_SUPPORTED

# Beginnings of the ids of answers, for which OpenAI's own .NET package looks.
CHAT_ID_PREFIX = "chatcmpl-"
TEXT_ID_PREFIX = "cmpl-"
RESPONSE_ID_PREFIX = "resp_"
# Beginnings of the paths of OpenAI's and Azure OpenAI's clients.
_PATHS = ("/v1/", "/openai/")


def is_openai_path(path: str) -> bool:
    """Returns whether errors under a path have OpenAI's shape, and not Azure's."""
    return path.startswith(_PATHS) or path == "/responses"  # which no API of Azure's own has


# Parameters of other servers that would change an answer or its form -> their values that ask for
# nothing, beside null. A request's type that has a field of the name reads it itself.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    # vLLM
    "bad_words": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "truncate_prompt_tokens": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "prompt_embeds": ([],),
    "return_tokens_as_token_ids": (False,),
    "logprob_token_ids": ([],),
    "thinking_token_budget": (),
    "repetition_detection": (),
    # SGLang
    "regex": (),
    "ebnf": (),
    "stop_regex": ([],),
    "no_stop_trim": (False,),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "lora_path": (),
    "session_params": ({},),
    "return_hidden_states": (False,),
    "input_ids": ([],),
    # llama.cpp
    "n_predict": (-1,),
    "n_probs": (0,),
    "typical_p": (1,),
    "typ_p": (1,),
    "top_n_sigma": (-1, 0),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "repeat_penalty": (1,),
    "samplers": ([],),
    "min_keep": (0,),
    "t_max_predict_ms": (0, -1),
    "post_sampling_probs": (False,),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "lora": ([],),
    "image_data": ([],),
    "input_prefix": ("",),
    "input_suffix": ("",),
    "response_fields": ([],),
    # Hugging Face's, and servers with more samplers
    "do_sample": (True,),
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "top_a": (0,),
    "tfs": (1,),
    "eta_cutoff": (0,),
    "epsilon_cutoff": (0,),
    "smoothing_factor": (0,),
    # Azure OpenAI
    "data_sources": ([],),
}
# The names that this server has for the same.
_OWN_NAMES = {
    "n_predict": "max_tokens",
    "n_probs": "logprobs and top_logprobs",
    "repeat_penalty": "repetition_penalty",
    "regex": "guided_regex",
    "ebnf": "guided_grammar",
    "input_ids": "prompt on a route of text completions",
    "lora_path": "model, with the adapter's name",
    "lora": "model, with the adapter's name",
}


def check_unknown(values: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Returns the body as it is: other fields outside `known` are ignored by the request's type.

    Raises:
        UnsupportedParameter: A field of UNSUPPORTED asks for something.
    """
    problems = [
        Problem(NOT_SUPPORTED, ("body", name), _refusal(name), values[name])
        for name, harmless in UNSUPPORTED.items()
        if name in values and name not in known
        if values[name] is not None and not _is_among(values[name], harmless)
    ]
    if problems:
        raise UnsupportedParameter("; ".join(problem.message for problem in problems), problems)
    return values


def _is_among(value: object, harmless: tuple[object, ...]) -> bool:
    """Returns whether a value is one of those; true is not 1, nor false 0."""
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in harmless
    )


def _refusal(name: str) -> str:
    own = _OWN_NAMES.get(name)
    remedy = "leave it out" if own is None else f"the name here is {own}"
    return f"{name} is not supported with this value; {remedy}"
