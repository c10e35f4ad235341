"""GET /usage: the tokens that the caller has used, by day."""

import operator
from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import Query, Request
from pydantic import BaseModel, Field

from serving.access.caller import Caller
from serving.accounting.accounts import Accounts
from serving.errors import Forbidden


class UsageOfAdapter(BaseModel):
    """The part of a day's use that was of one adapter."""

    adapter: str
    """The adapter's name."""
    requests: int
    """As of the day, like the fields that follow."""
    prompt_tokens: int
    """Tokens of rendered prompts."""
    cached_tokens: int
    """Those of them that earlier prompts had computed."""
    completion_tokens: int
    """Tokens generated."""


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
    adapters: list[UsageOfAdapter] = Field(default=[], exclude_if=operator.not_)
    """The parts of them that adapters have answered, if there are any."""


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
    days: list[UsageOfDay] = []
    for row in map(asdict, rows):
        if row["adapter"]:
            days[-1].adapters.append(UsageOfAdapter(**row))  # it stands behind its day
        else:
            days.append(UsageOfDay(**row, adapters=[]))
    return UsageReport(data=days)
