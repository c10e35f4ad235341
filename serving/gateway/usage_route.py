"""GET /usage: the tokens that the caller has used, by day."""

from typing import Annotated, Literal

from fastapi import Query, Request
from pydantic import BaseModel

from serving.access.caller import Caller
from serving.accounting.accounts import Accounts
from serving.errors import Forbidden


class UsageOfDay(BaseModel):
    """The use of one caller on one day."""

    caller: str
    """The name of the caller's key."""
    day: str
    """In UTC, such as 2026-11-22."""
    requests: int
    """Requests that were answered, also those answered in part."""
    prompt_tokens: int
    """Tokens of rendered prompts, as far as they were computed."""
    cached_tokens: int
    """Those of them that earlier prompts had computed."""
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
        bool, Query(alias="all", description="The use of every caller; for operators' keys.")
    ] = False,
) -> UsageReport:
    """Returns what the caller has used, by day.

    Raises:
        Forbidden: `all` is asked for with a key that is no operator's.
    """
    accounts: Accounts = request.app.state.accounts
    caller: Caller = request.state.caller
    if everybody and not caller.is_operator:
        raise Forbidden("the usage of everybody is for operators' keys; leave out 'all'")
    rows = await accounts.report(None if everybody else caller.name)
    return UsageReport(
        data=[
            UsageOfDay(
                caller=row.caller,
                day=row.day,
                requests=row.requests,
                prompt_tokens=row.prompt_tokens,
                cached_tokens=row.cached_tokens,
                completion_tokens=row.completion_tokens,
            )
            for row in rows
        ]
    )
