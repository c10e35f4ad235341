"""Slow twins of the writers of whole answers: an answer is built as its type, from all chunks."""

from collections.abc import Iterable

from serving.gateway.dialect.chat.response import (
    AssistantMessage,
    ChatCompletion,
    Choice,
    FunctionCall,
    Logprobs,
    TokenLogprob,
    ToolCall,
    TopLogprob,
)
from serving.gateway.dialect.chunks import Chunks, Identity, finish_reason, finite_logprob, usage
from serving.gateway.dialect.text.logprobs import text_logprobs
from serving.gateway.dialect.text.response import TextChoice, TextCompletion, TextLogprobs
from serving.proto import inference_pb2


def chat_completion(identity: Identity, chunks: Chunks) -> ChatCompletion:
    """Returns the answer that the chunks make up; the last one of them ends it."""
    return ChatCompletion(
        id=identity.id,
        created=identity.created,
        model=identity.model,
        choices=[
            Choice(
                index=index,
                message=AssistantMessage(
                    content="".join(chunk.text for chunk in own), tool_calls=_calls(own) or None
                ),
                finish_reason=finish_reason(own[-1]),
                logprobs=_chat_logprobs(own),
            )
            for index, own in _by_choice(chunks)
        ],
        usage=usage(chunks[-1]),
    )


def text_completion(identity: Identity, chunks: Chunks) -> TextCompletion:
    """Returns the answer that the chunks make up; the last one of them ends it."""
    return TextCompletion(
        id=identity.id,
        created=identity.created,
        model=identity.model,
        choices=[
            TextChoice(
                text="".join(chunk.text for chunk in own),
                index=index,
                logprobs=_text_logprobs(own),
                finish_reason=finish_reason(own[-1]),
            )
            for index, own in _by_choice(chunks)
        ],
        usage=usage(chunks[-1]),
    )


def _by_choice(chunks: Chunks) -> list[tuple[int, list[inference_pb2.GenerateChunk]]]:
    chunks_of: dict[int, list[inference_pb2.GenerateChunk]] = {}
    for chunk in chunks:
        chunks_of.setdefault(chunk.choice, []).append(chunk)
    return sorted(chunks_of.items())


def _calls(chunks: Iterable[inference_pb2.GenerateChunk]) -> list[ToolCall]:
    calls = [call for chunk in chunks for call in chunk.tool_calls]
    return [
        ToolCall(
            id=call.id,
            index=place,
            function=FunctionCall(name=call.name, arguments=call.arguments),
        )
        for place, call in enumerate(calls)
    ]


def _chat_logprobs(chunks: Iterable[inference_pb2.GenerateChunk]) -> Logprobs | None:
    content = [
        TokenLogprob(**_top(token).model_dump(), top_logprobs=list(map(_top, token.top)))
        for chunk in chunks
        for token in chunk.logprobs
    ]
    return Logprobs(content=content) if content else None


def _top(token: inference_pb2.TokenLogprob) -> TopLogprob:
    return TopLogprob(
        token=token.token.decode("utf-8", "replace"),
        token_id=token.token_id,
        logprob=finite_logprob(token),
        bytes=list(token.token),
    )


def _text_logprobs(chunks: Iterable[inference_pb2.GenerateChunk]) -> TextLogprobs | None:
    merged = inference_pb2.GenerateChunk()
    for chunk in chunks:
        merged.logprobs.extend(chunk.logprobs)
    return TextLogprobs(**text_logprobs(merged, 0)) if merged.logprobs else None
