"""Plans and limits as messages of serving/proto/group.proto, and back, equal in every number.

There is a function for each kind and direction. A step of 32 sequences takes a fraction of a
millisecond.
"""

import numpy as np

from mixtral_jax.sampling_params import SamplingParams
from serving.engine.device import Masks, PutLayer
from serving.proto import group_pb2 as pb
from serving.scheduling.step_plan import NO_SLOT, Chunk, Limits, StepPlan


def step_message(plans: tuple[StepPlan, ...], *, has_masks: bool = False) -> pb.Step:
    """Writes the plans of a step, one for each partition; its masks may come behind it."""
    return pb.Step(plans=[_plan_message(plan) for plan in plans], has_masks=has_masks)


def plans_of(step: pb.Step) -> tuple[StepPlan, ...]:
    """Reads the plans of a step."""
    return tuple(
        StepPlan(
            chunks=tuple(_chunk_of(chunk) for chunk in plan.chunks),
            copies=tuple(zip(plan.copies[::2], plan.copies[1::2], strict=True)),
        )
        for plan in step.plans
    )


def masks_message(masks: Masks) -> pb.Masks:
    """Writes what the rows of a step may draw."""
    message = pb.Masks()
    for rows in masks.allowed:
        plan = message.plans.add()
        if rows is not None:
            chunks = np.flatnonzero((rows != -1).any(axis=1))
            plan.chunks.extend(chunks.tolist())
            plan.words = rows[chunks].astype("<i4").tobytes()
    return message


def masks_of(message: pb.Masks, plans: tuple[StepPlan, ...]) -> Masks:
    """Reads what the rows of a step with these plans may draw; see PlanCheck.check_masks."""
    allowed: list[np.ndarray | None] = []
    for plan, masks in zip(plans, message.plans, strict=True):
        if not masks.chunks:
            allowed.append(None)
            continue
        words = np.frombuffer(masks.words, "<i4").reshape(len(masks.chunks), -1)
        rows = np.full((len(plan.chunks), words.shape[1]), -1, np.int32)
        rows[list(masks.chunks)] = words
        allowed.append(rows)
    return Masks(tuple(allowed))


def layer_message(put: PutLayer) -> pb.PutLayer:
    """Writes a layer of an adapter."""
    message = pb.PutLayer(slot=put.slot, layer=put.layer)
    for target, (a, b) in put.matrices.items():
        message.matrices.add(
            target=target,
            a_shape=a.shape,
            a=a.astype("<f4").tobytes(),
            b_shape=b.shape,
            b=b.astype("<f4").tobytes(),
        )
    return message


def layer_of(message: pb.PutLayer) -> PutLayer:
    """Reads a layer of an adapter; raises ValueError where shapes and bytes do not agree."""
    matrices = {
        low.target: (
            np.frombuffer(low.a, "<f4").reshape(tuple(low.a_shape)),
            np.frombuffer(low.b, "<f4").reshape(tuple(low.b_shape)),
        )
        for low in message.matrices
    }
    return PutLayer(message.slot, message.layer, matrices)


def limits_message(limits: Limits) -> pb.Limits:
    """Writes limits."""
    return pb.Limits(
        num_pages=limits.num_pages,
        page_size=limits.page_size,
        max_sequences=limits.max_sequences,
        max_step_tokens=limits.max_step_tokens,
        max_context=limits.max_context,
        max_waiting=limits.max_waiting,
        window=limits.window,
        prefix_reuse=limits.prefix_reuse,
        deterministic=limits.deterministic,
    )


def limits_of(message: pb.Limits) -> Limits:
    """Reads limits."""
    return Limits(
        num_pages=message.num_pages,
        page_size=message.page_size,
        max_sequences=message.max_sequences,
        max_step_tokens=message.max_step_tokens,
        max_context=message.max_context,
        max_waiting=message.max_waiting,
        window=message.window if message.HasField("window") else None,
        prefix_reuse=message.prefix_reuse,
        deterministic=message.deterministic,
    )


def _plan_message(plan: StepPlan) -> pb.Plan:
    copies = [page for pair in plan.copies for page in pair]
    return pb.Plan(chunks=[_chunk_message(chunk) for chunk in plan.chunks], copies=copies)


def _chunk_message(chunk: Chunk) -> pb.Chunk:
    return pb.Chunk(
        request_id=chunk.request_id,
        choice=chunk.choice,
        token_ids=chunk.token_ids,
        start=chunk.start,
        pages=chunk.pages,
        follows=chunk.follows,
        samples=chunk.samples,
        sampling=sampling_message(chunk.sampling),
        seed=chunk.seed,
        prompt_length=chunk.prompt_length,
        history=chunk.history,
        forbidden=chunk.forbidden,
        guesses=chunk.guesses,
        slot=None if chunk.slot == NO_SLOT else chunk.slot,
        targets=chunk.targets,
        target_start=chunk.target_start,
        asked=chunk.asked,
    )


def _chunk_of(message: pb.Chunk) -> Chunk:
    return Chunk(
        request_id=message.request_id,
        choice=message.choice,
        token_ids=tuple(message.token_ids),
        start=message.start,
        pages=tuple(message.pages),
        follows=message.follows if message.HasField("follows") else None,
        samples=message.samples,
        sampling=sampling_of(message.sampling),
        seed=message.seed,
        prompt_length=message.prompt_length,
        history=tuple(message.history),
        forbidden=frozenset(message.forbidden),
        guesses=message.guesses,
        slot=message.slot if message.HasField("slot") else NO_SLOT,
        targets=tuple(message.targets),
        target_start=message.target_start,
        asked=message.asked,
    )


def sampling_message(sampling: SamplingParams) -> pb.Sampling:
    """Writes parameters of sampling."""
    return pb.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        bias_ids=list(sampling.logit_bias),
        bias_values=list(sampling.logit_bias.values()),
        seed=sampling.seed,
        top_logprobs=sampling.top_logprobs,
    )


def sampling_of(message: pb.Sampling) -> SamplingParams:
    """Reads parameters of sampling; raises SamplingError for values out of range."""
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=dict(zip(message.bias_ids, message.bias_values, strict=True)),
        seed=message.seed if message.HasField("seed") else None,
        top_logprobs=message.top_logprobs if message.HasField("top_logprobs") else None,
    )
