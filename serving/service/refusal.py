"""The end of a gRPC call with an error of serving/errors.py."""

from typing import NoReturn

import grpc

from serving.errors import ServingError, to_grpc


async def abort(context: grpc.aio.ServicerContext, error: ServingError) -> NoReturn:
    """Ends a call with an error: its status, its text, and in the metadata its name and details."""
    await context.abort(grpc.StatusCode[error.grpc_status], str(error), to_grpc(error))
    raise AssertionError("abort raises")
