"""The plain loop: one sequence, one token after the other. The engine must give the same tokens.

`generate_draws` works on ids and gives logprobs; `generate_tokens` gives the ids alone; `generate`
puts a tokenizer around them and yields text. All of them take a `SamplingParams`, or its fields as
keywords, and run the same compiled programs as the engine (mixtral_jax/step). All check what they
are given when they are called, not when the first token is asked for.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from secrets import randbits
from typing import NamedTuple, Unpack

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mixtral_jax.errors import ChatError, SamplingError, StructureError, UserError
from mixtral_jax.model.adapter import Adapter
from mixtral_jax.model.adapter_stack import NO_SLOT, StackSizes
from mixtral_jax.model.arrangement import arrange
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.roofline.settings import GivenSettings, chip_under, settings_by_chip
from mixtral_jax.sampling_params import (
    MAX_BIASES,
    SamplingFields,
    SamplingParams,
    whole_number,
)
from mixtral_jax.step.buckets import Steps, compile_buckets
from mixtral_jax.step.draws import NO_TOKEN, unpack
from mixtral_jax.step.inputs import GroupInputs, StepSizes, host_array
from mixtral_jax.step.launcher import StepLauncher
from mixtral_jax.structure.continuation import FormProgress
from mixtral_jax.structure.form import Form, form_of
from mixtral_jax.structure.grammar import grammar_of
from mixtral_jax.structure.matcher import Guide
from mixtral_jax.structure.specification import Kind, Specification
from mixtral_jax.tokenization.messages import Message
from mixtral_jax.tokenization.tokenizer import Tokenizer

SLOT = 0  # of the only adapter
_LEAST_STEP_TOKENS = 128
_MOST_TOLD = 5  # rules that an error names


class Draw(NamedTuple):
    """A token, and logprobs of the model's own distribution, before sampling parameters act."""

    token_id: int
    logprob: float | None  # None if not asked for
    top_logprobs: tuple[tuple[int, float], ...]  # (token id, logprob), likeliest first


def generate(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompt: str | Sequence[Message],
    sampling: SamplingParams | None = None,
    *,
    max_tokens: int = 256,
    min_tokens: int = 0,
    ignore_eos: bool = False,
    json_schema: str | Mapping[str, object] | None = None,
    regex: str | None = None,
    adapter: Adapter | None = None,
    **fields: Unpack[SamplingFields],
) -> Iterator[str]:
    """Yields the answer's text as it comes; never half a character.

    Args:
        model: computes the logits.
        tokenizer: the model's own; None, which `load` gives for a folder without one, is refused.
        prompt: text to continue, or chat messages (`[{"role": "user", "content": "Hello"}]`),
            which the model's own template renders.
        sampling: how tokens are drawn; None for the defaults of SamplingParams.
        max_tokens: length at which the answer is cut.
        min_tokens: length before which no token that ends the answer is drawn.
        ignore_eos: lets the answer go on to `max_tokens`, or for as long as its structure lets it.
        json_schema: JSON Schema, as text or as the value that it stands for, that the answer must
            match; tokens that would break it are not drawn, and one of which a part cannot be
            enforced is refused. An answer that is cut at `max_tokens` is not whole.
        regex: Regular expression that the answer must match as a whole, in place of a schema.
        adapter: as `load_adapter` gives it; it answers in place of the model alone.
        fields: fields of SamplingParams that replace those of `sampling`, such as temperature=0.

    Raises:
        StructureError: the schema or the expression is wrong, or cannot be enforced.
        SamplingError: a number is out of range, or the prompt does not fit.
        ChatError: the prompt is neither text nor messages, or the messages cannot be rendered.
        AdapterError: the adapter is none of this model.
        UserError: there is no tokenizer.
        TypeError: `fields` names a parameter that does not exist.
    """
    if tokenizer is None:
        raise UserError(
            "there is no tokenizer to make tokens of the text; load a checkpoint that has one, or "
            "give token ids to generate_tokens"
        )
    continues = isinstance(prompt, str)
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        ids = tokenizer.chat(_checked_messages(prompt))
    tokens = generate_tokens(
        model,
        ids,
        _with_fields(sampling, SamplingParams(), fields),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        eos_ids=frozenset() if ignore_eos else tokenizer.eos_ids,
        form=_form(model, tokenizer, json_schema, regex, continues),
        adapter=adapter,
    )
    return _texts(tokens, tokenizer, continues)


def generate_tokens(
    model: Transformer,
    prompt_ids: Sequence[int],
    sampling: SamplingParams | None = None,
    *,
    max_tokens: int,
    min_tokens: int = 0,
    eos_ids: Collection[int] = frozenset(),
    form: Form | None = None,
    adapter: Adapter | None = None,
    **fields: Unpack[SamplingFields],
) -> Iterator[int]:
    """Yields the token ids of `generate_draws`, without the cost of logprobs."""
    sampling = _with_fields(sampling, SamplingParams(temperature=0.0), fields)
    draws = generate_draws(
        model,
        prompt_ids,
        replace(sampling, top_logprobs=None),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        eos_ids=eos_ids,
        form=form,
        adapter=adapter,
    )
    return (draw.token_id for draw in draws)


def generate_draws(
    model: Transformer,
    prompt_ids: Sequence[int],
    sampling: SamplingParams | None = None,
    *,
    max_tokens: int,
    min_tokens: int = 0,
    eos_ids: Collection[int] = frozenset(),
    kv_dtype: DTypeLike | None = None,
    form: Form | None = None,
    adapter: Adapter | None = None,
    **fields: Unpack[SamplingFields],
) -> Iterator[Draw]:
    """Yields up to `max_tokens` draws after the prompt; stops after one of `eos_ids`.

    Args:
        model: computes the logits.
        prompt_ids: at least one id; the context must have room for one token more.
        sampling: how tokens are drawn; None for the likeliest token, with its logprob.
        max_tokens: at least 1; the answer ends at the context's end in any case.
        min_tokens: number of tokens before which none of `eos_ids` is drawn.
        eos_ids: ids that end the answer.
        kv_dtype: of cached keys and values, such as int8; None for the model's own.
        form: structure that the answer must have, as `structure.form` makes it of a grammar. It
            ends with the structure's end, also without `eos_ids`.
        adapter: matrices that run beside the model, with their scaling in B; None for none.
        fields: fields of SamplingParams that replace those of `sampling`, such as top_logprobs=5.

    Raises:
        SamplingError: an id or a number is out of range, or the prompt does not fit.
        AdapterError: the adapter is none of this model.
        ConfigError: keys and values of `kv_dtype` do not exist on the model's devices.
        StructureError: the grammar has run into a limit; raised while the answer is drawn.
        TypeError: `fields` names a parameter that does not exist.
    """
    sampling = _with_fields(sampling, SamplingParams(temperature=0.0, top_logprobs=0), fields)
    vocab_size, context = model.config.vocab_size, model.config.max_context
    ids = _checked_ids("the prompt", prompt_ids, vocab_size)
    ends = frozenset(_checked_ids("eos_ids", eos_ids, vocab_size))
    if not ids:
        raise SamplingError("the prompt is empty; give at least one token")
    if len(ids) >= context:
        raise SamplingError(
            f"the prompt has {len(ids)} tokens, the context of this model holds {context}; "
            "shorten the prompt"
        )
    if whole_number("max_tokens", max_tokens) < 1:
        raise SamplingError(f"max_tokens is {max_tokens}; ask for at least 1 token")
    if whole_number("min_tokens", min_tokens) < 0:
        raise SamplingError(f"min_tokens is {min_tokens}; it must be 0 or more")
    if form is not None:
        min_tokens = min_tokens if ends else max_tokens
        ends |= form.warm.end_ids
    sampling.check_vocabulary(vocab_size)
    if len(sampling.logit_bias) + len(ends) > MAX_BIASES:
        raise SamplingError(
            f"logit_bias and eos_ids have {len(sampling.logit_bias) + len(ends)} entries "
            f"together; give at most {MAX_BIASES}"
        )
    length = min(len(ids) + max_tokens, context)
    sizes = None if adapter is None else StackSizes.of_adapter(adapter, model.config)
    steps = steps_for(model, length, kv_dtype, has_masks=form is not None, adapters=sizes)
    launcher = StepLauncher(model, steps)
    if adapter is not None:
        launcher.put_adapter(SLOT, adapter)
    slot = NO_SLOT if adapter is None else SLOT
    return draws_of(launcher, ids, sampling, length, min_tokens, ends, form, slot)


def steps_for(
    model: Transformer,
    length: int,
    kv_dtype: DTypeLike | None = None,
    *,
    has_masks: bool = False,
    adapters: StackSizes | None = None,
) -> Steps:
    """Returns the compiled steps of one sequence of up to `length` tokens, prompt and answer.

    Room is made for a power of two of pages, so that sequences of similar length share one
    compilation, which the model keeps. The draw under a mask is compiled where `has_masks`, and the
    layers beside an adapter where there are sizes of `adapters`.
    """
    arrange(model)  # before the key is taken, which has the dtypes of arrays
    placement = model.placement
    kv_dtype = placement.checked_kv_dtype(kv_dtype, model.config)
    num_pages = 1 << (-(-length // placement.page_size) - 1).bit_length()
    sizes = StepSizes(
        num_pages=num_pages,
        page_size=placement.page_size,
        max_sequences=1,
        max_context=num_pages * placement.page_size,
    )
    arrays = jax.tree.leaves(nnx.state(model, nnx.Param))
    key = (
        sizes,
        kv_dtype,
        has_masks,
        adapters,
        *((array.shape, str(array.dtype)) for array in arrays),
    )
    steps = model.programs.get(key)
    if not isinstance(steps, Steps):
        rows = {1: 1, _step_tokens(model, kv_dtype, num_pages * placement.page_size): 1}
        steps = compile_buckets(
            model, sizes, rows, kv_dtype=kv_dtype, has_masks=has_masks, adapters=adapters
        )
        model.programs.keep(key, steps)
    return steps


def _step_tokens(model: Transformer, kv_dtype: str, room: int) -> int:
    """Returns the tokens of a step that takes in a prompt, of a sequence with this room."""
    placement = model.placement
    if placement.step_tokens is not None:
        return placement.step_tokens
    given = GivenSettings(max_sequences=placement.num_sequence_groups, kv_dtype=kv_dtype)
    settings = settings_by_chip(model.config, placement, chip_under(placement), given)
    tokens = -(-settings.max_step_tokens // placement.num_sequence_groups)
    return min(tokens, max(_LEAST_STEP_TOKENS, room))


def _checked_messages(prompt: Sequence[Message]) -> Sequence[Message]:
    """Returns the messages of a prompt that is no text; raises ChatError for anything else."""
    wrong = None
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        wrong = f"a {type(prompt).__name__}"
    else:
        for message in prompt:
            if not isinstance(message, Mapping):
                wrong = f"a {type(prompt).__name__} that holds a {type(message).__name__}"
    if wrong is not None:
        raise ChatError(
            f"the prompt is {wrong}; give a text, or a list of messages such as "
            '[{"role": "user", "content": "Hello"}]; generate_tokens takes token ids'
        )
    return prompt


def _with_fields(
    sampling: SamplingParams | None, default: SamplingParams, fields: SamplingFields
) -> SamplingParams:
    """Returns the parameters, or the default, with some fields replaced.

    Raises SamplingError for what is no SamplingParams, and TypeError for unknown fields.
    """
    if sampling is None:
        sampling = default
    if not isinstance(sampling, SamplingParams):
        raise SamplingError(
            f"sampling is a {type(sampling).__name__}; give SamplingParams(temperature=0), or its "
            "fields as keywords"
        )
    for name in fields:
        if name not in SamplingParams.__dataclass_fields__:
            raise TypeError(f"there is no parameter {name!r}; see mixtral_jax.SamplingParams")
    return replace(sampling, **fields) if fields else sampling


def _checked_ids(name: str, ids: Collection[int], vocab_size: int) -> list[int]:
    """Returns ids as Python's integers; raises SamplingError for those that do not exist."""
    if not isinstance(ids, Iterable):
        raise SamplingError(f"{name} is {ids!r}; give a list of token ids")
    checked = [whole_number(f"an id of {name}", token) for token in ids]
    for token in checked:
        if not 0 <= token < vocab_size:
            raise SamplingError(
                f"{name} holds the id {token}; ids are 0 or more and below {vocab_size}"
            )
    return checked


def _form(
    model: Transformer,
    tokenizer: Tokenizer,
    json_schema: str | Mapping[str, object] | None,
    regex: str | None,
    continues: bool,
) -> Form | None:
    """Returns the form of what an answer must match; None if it may be anything."""
    if json_schema is not None and regex is not None:
        raise StructureError("json_schema and regex are both given; give one of them")
    if json_schema is not None:
        text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
        wanted = Specification(Kind.JSON_SCHEMA, text)
    elif regex is not None:
        wanted = Specification(Kind.REGEX, regex)
    else:
        return None
    # The model keeps the last guide, because making one reads the whole vocabulary.
    kept = model.programs.get("guide")
    if not (isinstance(kept, tuple) and kept[0] is tokenizer):
        kept = tokenizer, Guide(tokenizer, model.config.vocab_size)
        model.programs.keep("guide", kept)
    form = form_of(grammar_of(wanted, space=tokenizer.dummy_space and not continues), kept[1])
    if form.checks:  # nobody would be told, and nobody checks the text
        rules = "; ".join(form.weakened[:_MOST_TOLD])
        raise StructureError(f"json_schema cannot be enforced as a whole; leave out: {rules}")
    return form


def draws_of(
    launcher: StepLauncher,
    ids: list[int],
    sampling: SamplingParams,
    length: int,
    min_tokens: int,
    eos_ids: frozenset[int],
    form: Form | None,
    slot: int,
) -> Iterator[Draw]:
    """Yields draws until the sequence `ids`, which grows, has `length` tokens or has ended.

    The other arguments are those of `generate_draws`, checked; `slot` is that of the adapter in the
    launcher's stacks, or NO_SLOT.
    """
    steps, prompt_length = launcher.steps, len(ids)
    seed = randbits(31) if sampling.seed is None else sampling.seed
    progress = FormProgress(form, takes_turns=sampling.top_logprobs is not None)
    pages, done = range(steps.sizes.num_pages), 0
    while len(ids) < length:
        if (forced := progress.forced()) is not None:
            ids.append(forced)
            yield Draw(forced, None, ())
            if forced in eos_ids:
                return
            continue
        new = ids[done : done + max(steps.rows)]
        draws = done + len(new) == len(ids)
        bucket = steps.bucket(len(new), adapted=slot != NO_SLOT, masked=draws and form is not None)
        forbidden = eos_ids if len(ids) - prompt_length < min_tokens else frozenset[int]()
        inputs = steps.blank(
            bucket,
            with_history=sampling.has_penalties,
            with_biases=bool(sampling.logit_bias or forbidden),
        )
        group = GroupInputs(inputs, group=0, max_sequences=1)
        row = group.add(new, done, pages, slot=slot)
        done += len(new)
        if not draws:
            launcher.launch(inputs, draws=False)
            continue
        group.sample(
            row,
            sampling,
            seed=seed,
            position=done,
            prompt_length=prompt_length,
            history=ids[:-1] if sampling.has_penalties else (),
            forbidden=forbidden,
        )
        if form is None:
            launched = launcher.launch(inputs)
        else:
            walked, mask = launcher.walk(inputs), progress.mask()
            allowed = None
            if mask is not None:
                rows = steps.num_sequence_groups * inputs.num_drawn
                allowed = host_array((rows, len(mask)), -1)
                allowed[row] = mask
            launched = launcher.draw(walked, allowed)
        draw = Draw(*unpack(np.asarray(launched.packed)).of_row(row, sampling.top_logprobs))
        if draw.token_id == NO_TOKEN:
            raise SamplingError(
                "the model's values are not finite (NaN or infinity), and no token follows from "
                "them; look at its weights and those of its adapter"
            )
        ids.append(draw.token_id)
        yield draw
        if draw.token_id in eos_ids:
            return
        progress.take(draw.token_id)


def _texts(tokens: Iterator[int], tokenizer: Tokenizer, continues: bool) -> Iterator[str]:
    """Yields the text of tokens as far as it is certain."""
    detokenizer = tokenizer.detokenizer(continues=continues)
    for token in tokens:
        if text := detokenizer.push(token):
            yield text
    if text := detokenizer.finish():
        yield text
