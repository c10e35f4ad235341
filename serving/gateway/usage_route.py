"""GET /usage: what the caller has used, by day."""

from typing import Annotated, Literal

from fastapi import Query, Request
from pydantic import BaseModel

from serving.access.keyring import DEFAULT
from serving.errors import Forbidden
from serving.gateway.config import Books
from serving.gateway.http.request_record import Exchange


class UsageOfDay(BaseModel):
    """What one caller used on one day."""

    caller: str
    """The name of its key."""
    day: str
    """In UTC, such as 2026-11-22."""
    requests: int
    """That were answered, also in part."""
    prompt_tokens: int
    """Tokens of rendered prompts."""
    completion_tokens: int
    """Tokens generated."""


class UsageReport(BaseModel):
    """The answer of /usage."""

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[UsageOfDay]
    """By caller and day."""


async def report_usage(
    request: Request,
    everybody: Annotated[
        bool, Query(alias="all", description="Of every caller; for the operator's own key.")
    ] = False,
) -> UsageReport:
    """What the caller has used, by day."""
    books: Books = request.app.state.books
    caller = Exchange.of(request).caller
    if everybody and caller != DEFAULT:
        raise Forbidden("the usage of everybody is for the operator's own key; leave out 'all'")
    rows = await books.accounts.report(None if everybody else caller)
    return UsageReport(
        data=[
            UsageOfDay(
                caller=row.caller,
                day=row.day,
                requests=row.requests,
                prompt_tokens=row.prompt_tokens,
                completion_tokens=row.completion_tokens,
            )
            for row in rows
        ]
    )
