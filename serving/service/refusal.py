"""The end of a gRPC call with an error of serving/errors.py."""

from typing import NoReturn

import grpc

from serving.errors import ERROR_METADATA, ServingError


async def abort(context: grpc.aio.ServicerContext, error: ServingError) -> NoReturn:
    """Ends a call with an error: its status, its text, and its name in the trailing metadata."""
    await context.abort(
        grpc.StatusCode[error.grpc_status], str(error), ((ERROR_METADATA, type(error).__name__),)
    )
    raise AssertionError("abort raises")
