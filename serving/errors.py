"""Every error that a caller can meet, with its gRPC status, HTTP status and Azure code.

    ServingError
    ├── InvalidRequest          INVALID_ARGUMENT     400  the request is malformed
    │   ├── ContextTooLong      INVALID_ARGUMENT     400  prompt and answer exceed the context
    │   ├── RequestTooLarge     INVALID_ARGUMENT     413  the body exceeds what the gateway reads
    │   ├── UnsupportedMedia    INVALID_ARGUMENT     415  the body is not JSON, or compressed
    │   └── InvalidParameter    INVALID_ARGUMENT     422  a parameter's type, range or name is wrong
    │       └── UnsupportedParameter INVALID_ARGUMENT 422 known, but not supported
    ├── Unauthenticated         UNAUTHENTICATED      401  no key, or a wrong one
    ├── Forbidden               PERMISSION_DENIED    403  known, but not allowed here
    ├── NotFound                NOT_FOUND            404  no such route or model
    ├── MethodNotAllowed        UNIMPLEMENTED        405  the route exists, the method does not
    ├── DeadlineExceeded        DEADLINE_EXCEEDED    408  the caller's deadline passed
    ├── Overloaded              RESOURCE_EXHAUSTED   429  the queue or the caller's minute is full
    ├── EngineFailure           INTERNAL             424  the model failed; a retry does not help
    └── Unavailable             UNAVAILABLE          503  not ready, draining or gone; a retry helps

The service puts the class name into the trailing metadata (`ERROR_METADATA`), because several
classes share a gRPC status; `from_grpc` turns it back into the same error on the gateway's side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

ERROR_METADATA = "mixtral-error"


class SetupError(ValueError):
    """Root of what an operator can get wrong before anything is served.

    Its leaves stand in the rooms that raise them: access, cluster, launch, gateway, observe and
    bench. A command prints the message in one line, which names the thing and the remedy.
    """


class ServingError(Exception):
    """The root of the tree. Its message is for the caller, and names the thing and the remedy.

    Attributes:
        grpc_status: The name of its gRPC status.
        http_status: Its HTTP status.
        azure_code: Its code in the bodies of Azure's API.
        retry_after: Seconds to wait before a retry; None where a retry does not help.
    """

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    azure_code: ClassVar[str] = "InternalServerError"
    retry_after: int | None = None


class InvalidRequest(ServingError):
    """The request is malformed."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    azure_code = "BadRequest"


class ContextTooLong(InvalidRequest):
    """Prompt and answer together exceed the model's context."""

    azure_code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    """The body or message is larger than the server reads."""

    http_status = 413
    azure_code = "RequestEntityTooLarge"


class UnsupportedMedia(InvalidRequest):
    """The body is no JSON, or it is compressed."""

    http_status = 415
    azure_code = "UnsupportedMediaType"


@dataclass(frozen=True)
class Problem:
    """A mistake in one parameter.

    Attributes:
        kind: A name for programs, such as pydantic's "less_than_equal".
        path: The way to the parameter, such as ("body", "messages", "0", "role").
        message: A sentence for people.
        value: The wrong value.
    """

    kind: str
    path: tuple[str, ...]
    message: str
    value: object


class InvalidParameter(InvalidRequest):
    """The type, range or name of a parameter is wrong.

    Args:
        message: The message for the caller.
        problems: Every mistake, where they are known. They do not cross gRPC.
    """

    http_status = 422
    azure_code = "Invalid input"

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class UnsupportedParameter(InvalidParameter):
    """A known parameter asks for a feature that this server does not have."""

    azure_code = "parameter_not_supported"


class Unauthenticated(ServingError):
    """The caller has shown no key or token, or a wrong one."""

    grpc_status = "UNAUTHENTICATED"
    http_status = 401
    azure_code = "Unauthorized"


class Forbidden(ServingError):
    """The caller is known, but not allowed to do this."""

    grpc_status = "PERMISSION_DENIED"
    http_status = 403
    azure_code = "Forbidden"


class NotFound(ServingError):
    """There is no such route or model."""

    grpc_status = "NOT_FOUND"
    http_status = 404
    azure_code = "NotFound"


class MethodNotAllowed(ServingError):
    """The route exists, but not with this method."""

    grpc_status = "UNIMPLEMENTED"
    http_status = 405
    azure_code = "MethodNotAllowed"


class DeadlineExceeded(ServingError):
    """The caller's deadline has passed."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 408
    azure_code = "RequestTimeout"


class Overloaded(ServingError):
    """The queue is full, or the caller has used up its minute.

    Args:
        message: The message for the caller.
        retry_after: Seconds to wait, where they are known. They do not cross gRPC.
    """

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429
    azure_code = "TooManyRequests"
    retry_after = 1

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        if retry_after is not None:
            self.retry_after = retry_after


class EngineFailure(ServingError):
    """The model failed; a retry does not help."""

    grpc_status = "INTERNAL"
    http_status = 424
    azure_code = "ModelError"


class Unavailable(ServingError):
    """The server is not ready, drains or is gone; a retry helps."""

    grpc_status = "UNAVAILABLE"
    http_status = 503
    azure_code = "ServiceUnavailable"
    retry_after = 2


LEAVES: dict[str, type[ServingError]] = {
    leaf.__name__: leaf
    for leaf in (
        InvalidRequest,
        ContextTooLong,
        RequestTooLarge,
        UnsupportedMedia,
        InvalidParameter,
        UnsupportedParameter,
        Unauthenticated,
        Forbidden,
        NotFound,
        MethodNotAllowed,
        DeadlineExceeded,
        Overloaded,
        EngineFailure,
        Unavailable,
    )
}

# The error for a status that arrives without a name, such as from a proxy or a dead server.
_BY_STATUS: dict[str, type[ServingError]] = {
    leaf.grpc_status: leaf for leaf in reversed(LEAVES.values())
}


def from_grpc(status: str, name: str | None, message: str) -> ServingError:
    """Rebuilds the error of a failed call.

    Args:
        status: The name of its gRPC status.
        name: Its class, from the metadata `ERROR_METADATA`; None if there is none.
        message: Its details.
    """
    kind = LEAVES.get(name or "") or _BY_STATUS.get(status, EngineFailure)
    return kind(message)
