"""GET /usage: the tokens that the caller has used, by day."""

from typing import Annotated, Literal

from fastapi import Query, Request
from pydantic import BaseModel

from serving.access.keyring import DEFAULT
from serving.accounting.accounts import Accounts
from serving.errors import Forbidden
from serving.gateway.http.request_record import RequestRecord


class UsageOfDay(BaseModel):
    """The use of one caller on one day."""

    caller: str
    """The name of the caller's key."""
    day: str
    """In UTC, such as 2026-11-22."""
    requests: int
    """Requests that were answered, also those answered in part."""
    prompt_tokens: int
    """Tokens of rendered prompts."""
    completion_tokens: int
    """Tokens generated."""


class UsageReport(BaseModel):
    """The answer of /usage."""

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[UsageOfDay]
    """The use by caller and day."""


async def report_usage(
    request: Request,
    everybody: Annotated[
        bool, Query(alias="all", description="The use of every caller; for the operator's own key.")
    ] = False,
) -> UsageReport:
    """Returns what the caller has used, by day.

    Raises:
        Forbidden: `all` is asked for with another key than the operator's.
    """
    accounts: Accounts = request.app.state.accounts
    caller = RequestRecord.of(request).caller
    if everybody and caller != DEFAULT:
        raise Forbidden("the usage of everybody is for the operator's own key; leave out 'all'")
    rows = await accounts.report(None if everybody else caller)
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
