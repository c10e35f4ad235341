"""POST /tokenize, /detokenize and count_tokens: calls that cost a request and no tokens."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response

from serving.access.caller import Caller
from serving.accounting.admission import Admission
from serving.errors import InvalidParameter, InvalidRequest
from serving.gateway.answering import Gateway
from serving.gateway.dialect import parsing
from serving.gateway.dialect.anthropic.hosted_tools import MessagesFields
from serving.gateway.dialect.anthropic.request import CountRequest
from serving.gateway.dialect.anthropic.response import TokenCountAnswer
from serving.gateway.dialect.fields import Body
from serving.gateway.dialect.prompt_size import check_tokenized
from serving.gateway.dialect.tokens.request import DetokenizeRequest, TokenizeRequest
from serving.gateway.dialect.tokens.response import detokenized, tokenized
from serving.gateway.http import body
from serving.gateway.http.body_room import BodyRoom
from serving.gateway.http.failures import LIMIT_HEADERS
from serving.proto import inference_pb2

Asked = TypeVar("Asked", bound=Body)


class Tokenization:
    """Answers the three routes.

    Args:
        gateway: Has the model service, and the room for bodies that its other routes share.
        admission: Admits requests within the limits of their callers.
        body_bytes: The longest body of a request.
        body_seconds: The longest time that a body may take to arrive.
    """

    def __init__(
        self, gateway: Gateway, admission: Admission, body_bytes: int, body_seconds: float
    ) -> None:
        self._service = gateway.service
        self._bodies: BodyRoom = gateway.bodies
        self._admission = admission
        self._body_bytes = body_bytes
        self._body_seconds = body_seconds

    async def tokenize(self, request: Request) -> Response:
        """Returns the tokens of a text or a chat."""

        async def answer(asked: TokenizeRequest) -> bytes:
            model = await self._service.model()
            call = asked.proto()
            check_tokenized(call, model)
            tokens = await self._service.tokenize(call, request.state.caller.name)
            return await asyncio.to_thread(tokenized, asked, tokens, model.max_context)

        return await self._answer(request, TokenizeRequest, answer)

    async def detokenize(self, request: Request) -> Response:
        """Returns the text of tokens."""

        async def answer(asked: DetokenizeRequest) -> bytes:
            try:
                text = await self._service.detokenize(asked.proto(), request.state.caller.name)
            except InvalidParameter as error:
                raise asked.as_sent(error) from error
            return await asyncio.to_thread(detokenized, text)

        return await self._answer(request, DetokenizeRequest, answer)

    async def count(self, request: Request) -> Response:
        """Returns the number of tokens of a conversation in Anthropic's form."""
        ignores = request.app.state.ignores_hosted_tools
        fields = MessagesFields(ignores_hosted_tools=ignores)

        async def answer(asked: CountRequest) -> bytes:
            call = inference_pb2.TokenizeRequest(chat=asked.chat())
            check_tokenized(call, await self._service.model())
            try:
                tokens = await self._service.tokenize(call, request.state.caller.name)
            except InvalidRequest as error:
                raise asked.as_sent(error) from error
            return TokenCountAnswer(input_tokens=len(tokens.ids)).model_dump_json().encode()

        response = await self._answer(request, CountRequest, answer, fields.apply)
        response.headers.update(fields.headers)
        return response

    async def _answer(
        self,
        request: Request,
        kind: type[Asked],
        answer: Callable[[Asked], Awaitable[bytes]],
        unknown: parsing.UnknownFields = parsing.refuse_unknown,
    ) -> Response:
        """Admits a request, reads its body and answers it.

        Args:
            request: The request.
            kind: The type of its body.
            answer: Makes the answer's body.
            unknown: The rule for fields that the type does not have.

        Raises ServingError: It is refused, or the service does not answer.
        """
        caller: Caller = request.state.caller
        limit_headers = partial(self._admission.headers, caller)
        setattr(request.state, LIMIT_HEADERS, limit_headers)
        lease = self._admission.begin(caller)
        hold = self._bodies.hold(caller.name)
        try:
            content = await body.read_body(request, hold, self._body_bytes, self._body_seconds)
            written = await answer(parsing.read(content, kind, unknown))
        finally:
            hold.free()
            lease.settle()
        return Response(written, media_type="application/json", headers=limit_headers())


async def tokenize(request: Request) -> Response:
    """Returns the tokens of a text or a chat."""
    return await _tokenization(request).tokenize(request)


async def detokenize(request: Request) -> Response:
    """Returns the text of tokens."""
    return await _tokenization(request).detokenize(request)


async def count_tokens(request: Request) -> Response:
    """Returns the number of tokens of a conversation in Anthropic's form."""
    return await _tokenization(request).count(request)


def _tokenization(request: Request) -> Tokenization:
    tokenization: Tokenization = request.app.state.tokenization
    return tokenization
