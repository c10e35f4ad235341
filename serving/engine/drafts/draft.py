"""Draft: the checkpoint of a draft model, checked against the model whose answers it guesses.

It is placed on the same devices, and has a part of the memory for pages: a page for every
`PAGES_OF_MODEL` of the model's, because guesses pay while few answers are computed together.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
from jax.typing import DTypeLike

from mixtral_jax.checkpoint.pretrained import Pretrained, open_pretrained
from mixtral_jax.errors import ConfigError, UserError
from mixtral_jax.model.transformer import Transformer, held_bytes
from mixtral_jax.placement import Placement
from mixtral_jax.step.buckets import Steps, compile_buckets
from mixtral_jax.step.inputs import StepSizes
from mixtral_jax.step.launcher import StepLauncher
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.engine.drafts.drafter import MOST_RUN_STEPS, DraftModel
from serving.scheduling.step_plan import Limits

PAGES_OF_MODEL = 4
_FEW_ROWS = 8
_SMALL = ("int8", "float8_e4m3fn")  # types of keys and values that the draft takes over


@dataclass(frozen=True)
class Draft:
    """A draft model before its weights are read."""

    pretrained: Pretrained
    abstract: Transformer

    @classmethod
    def open(cls, folder: str, model: Pretrained, placement: Placement) -> "Draft":
        """Opens the checkpoint of a draft for a model.

        Args:
            folder: as `open_pretrained` takes it.
            model: whose answers it guesses.
            placement: of the model.

        Raises ConfigError where the draft has another vocabulary, or cannot stand on the devices,
        or where there is more than one group of sequences or processes.
        """
        if jax.process_count() > 1 or placement.num_sequence_groups > 1:
            raise ConfigError(
                "--draft-model guesses for one group of sequences in one process; leave it out, or "
                "give a --mesh with data=1 and no --dp-attention"
            )
        pretrained = open_pretrained(folder)
        _check_vocabulary(folder, pretrained, model)
        card = pretrained.card
        # It sees no further back than the model does.
        windows = [w for w in (card.model.sliding_window, model.card.model.sliding_window) if w]
        config = replace(card.model, sliding_window=min(windows, default=None))
        pretrained = replace(pretrained, card=replace(card, model=config))
        try:
            own = pretrained.placement(mesh=placement.mesh_text)
        except UserError as error:
            raise ConfigError(
                f"--draft-model {folder} cannot stand on the devices of the model: {error}"
            ) from error
        return cls(pretrained, Transformer(config, own, rngs=None))

    @property
    def held_bytes(self) -> int:
        """Bytes of its weights on each device."""
        return held_bytes(self.abstract)

    def page_bytes(self, page_size: int, kv_dtype: DTypeLike | None) -> float:
        """Returns its bytes on each device for one page of the model's.

        `kv_dtype` is that of the model's keys and values.
        """
        config, placement = self.abstract.config, self.abstract.placement
        page = placement.page_form(config, page_size, self.kv_dtype(page_size, kv_dtype))
        return config.num_layers * page.nbytes / PAGES_OF_MODEL

    def kv_dtype(self, page_size: int, kv_dtype: DTypeLike | None) -> str:
        """Returns the type of its keys and values beside a model with pages of `kv_dtype`."""
        placement, name = self.abstract.placement, str(kv_dtype)
        is_small = name in _SMALL and placement.has_pages(self.abstract.config, page_size, name)
        return name if is_small else placement.activation_dtype

    def limits(self, model: Limits) -> Limits:
        """Returns the sizes of its cache and of its steps, from those of the model."""
        context = min(model.max_context, self.abstract.config.max_context)
        rows = max(1, model.max_sequences // 2)  # an answer with guesses takes two places or more
        pages = min(model.num_pages // PAGES_OF_MODEL, rows * -(-context // model.page_size))
        limits = replace(
            model,
            num_pages=max(1, pages),
            max_sequences=rows,
            max_step_tokens=max(model.max_step_tokens, rows),
            max_context=context,
            window=self.abstract.config.sliding_window,
        )
        return replace(limits, max_context=limits.room)

    def load(self) -> Transformer:
        """Reads the weights onto the devices."""
        return self.pretrained.load(self.abstract.placement)


@dataclass(frozen=True)
class LoadedDraft:
    """A draft model on its devices, and its programs."""

    model: Transformer
    limits: Limits
    """The result of `Draft.limits`."""
    steps: Steps
    """The result of `compile_draft` for these limits."""

    def drafter(self) -> DraftModel:
        """Returns what guesses by it, with pages of its own."""
        return DraftModel(StepLauncher(self.model, self.steps), self.limits)


def compile_draft(
    model: Transformer,
    limits: Limits,
    progress: Callable[[str], None] = lambda line: None,
    kv_dtype: DTypeLike | None = None,
) -> Steps:
    """Compiles all programs of a draft model, which may be abstract."""
    sizes = StepSizes(
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        max_sequences=limits.max_sequences,
        max_context=limits.max_context,
    )
    few = [size for size in (1, 2, 4, _FEW_ROWS) if size < limits.max_sequences]
    if model.placement.kernels.whole_step:
        few = few[-1:]  # a step of one token takes as long as one of eight there
    buckets = {*few, limits.max_sequences, limits.max_step_tokens}
    return compile_buckets(
        model,
        sizes,
        {bucket: min(bucket, limits.max_sequences) for bucket in buckets},
        lambda line: progress(f"draft model: {line}"),
        kv_dtype,
        has_masks=False,
        run_steps=MOST_RUN_STEPS,
    )


def _check_vocabulary(folder: str, draft: Pretrained, model: Pretrained) -> None:
    """Raises ConfigError unless both models mean the same by every id."""
    ours, theirs = draft.card.model.vocab_size, model.card.model.vocab_size
    if ours != theirs:
        problem = f"it has {ours:,} ids, and {model.card.name} has {theirs:,}"
    else:
        different = _first_difference(draft.tokenizer, model.tokenizer)
        if different is None:
            return
        problem = f"the id {different} stands for another text there than in {model.card.name}"
    raise ConfigError(
        f"--draft-model {folder} has another vocabulary: {problem}; give a model that was made "
        "with the same tokenizer"
    )


def _first_difference(ours: Tokenizer, theirs: Tokenizer) -> int | None:
    """Returns the first id that does not stand for the same bytes."""
    for token in range(max(ours.vocab_size, theirs.vocab_size)):
        if ours.token_bytes(token) != theirs.token_bytes(token):
            return token
    return None
