"""Routes that tell whether the server lives and what it is, without a key."""

from importlib.metadata import version

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from serving.gateway.dialect.fields import Described
from serving.gateway.upstream import ModelService


class Status(Described):
    """The answer of a health check."""

    status: str
    """`live`, `ready`, or `ok` on the paths of other servers."""


class Version(Described):
    """The answer of /version."""

    version: str
    """The version of mixtral-jax."""


async def live() -> Response:
    """Returns 200 for as long as the process lives."""
    return JSONResponse(Status(status="live").model_dump())


async def ready(request: Request) -> Response:
    """Returns 200 if the model service serves; raises Unavailable if it does not."""
    await _service(request).check_ready()
    return JSONResponse(Status(status="ready").model_dump())


async def health(request: Request) -> Response:
    """Returns what `ready` does, under the names of vLLM, llama.cpp and SageMaker."""
    await _service(request).check_ready()
    return JSONResponse(Status(status="ok").model_dump())


async def tell_version() -> Response:
    """Returns the version of the package, as vLLM's route does."""
    return JSONResponse(Version(version=version("mixtral-jax")).model_dump())


def _service(request: Request) -> ModelService:
    service: ModelService = request.app.state.gateway.service
    return service
