"""POST /tokenize and /detokenize: calls of the model service that cost a request and no tokens."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from fastapi import Request
from fastapi.responses import Response

from serving.access.caller import Caller
from serving.accounting.admission import Admission
from serving.gateway.answering import Gateway
from serving.gateway.dialect import parsing
from serving.gateway.dialect.fields import Body
from serving.gateway.dialect.prompt_size import check_tokenized
from serving.gateway.dialect.tokens.request import DetokenizeRequest, TokenizeRequest
from serving.gateway.dialect.tokens.response import detokenized, tokenized
from serving.gateway.http import body
from serving.gateway.http.body_room import BodyRoom
from serving.gateway.http.failures import LIMIT_HEADERS

Asked = TypeVar("Asked", bound=Body)


class Tokenization:
    """Answers the two routes.

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
            text = await self._service.detokenize(asked.proto(), request.state.caller.name)
            return await asyncio.to_thread(detokenized, text)

        return await self._answer(request, DetokenizeRequest, answer)

    async def _answer(
        self,
        request: Request,
        kind: type[Asked],
        answer: Callable[[Asked], Awaitable[bytes]],
    ) -> Response:
        """Admits a request, reads its body and answers it.

        Raises ServingError: It is refused, or the service does not answer.
        """
        caller: Caller = request.state.caller
        limit_headers = partial(self._admission.headers, caller)
        setattr(request.state, LIMIT_HEADERS, limit_headers)
        lease = self._admission.begin(caller)
        hold = self._bodies.hold(caller.name)
        try:
            content = await body.read_body(request, hold, self._body_bytes, self._body_seconds)
            written = await answer(parsing.read(content, kind, parsing.refuse_unknown))
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


def _tokenization(request: Request) -> Tokenization:
    tokenization: Tokenization = request.app.state.tokenization
    return tokenization
