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
    ├── NotFound                NOT_FOUND            404  no such route
    │   └── ModelNotFound       NOT_FOUND            404  no model or adapter has this name
    ├── MethodNotAllowed        UNIMPLEMENTED        405  the route exists, the method does not
    ├── DeadlineExceeded        DEADLINE_EXCEEDED    408  the caller's deadline passed
    ├── Overloaded              RESOURCE_EXHAUSTED   429  the queue or the caller's minute is full
    ├── EngineFailure           INTERNAL             424  the model failed; a retry does not help
    └── Unavailable             UNAVAILABLE          503  not ready, draining or gone; a retry helps

The service puts the class name into the trailing metadata (`ERROR_METADATA`), because several
classes share a gRPC status, and beside it the details that Google's clients read: RetryInfo and
BadRequest (https://cloud.google.com/apis/design/errors#error_details). `from_grpc` turns them back
into the same error on the caller's side.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

ERROR_METADATA = "mixtral-error"
# Metadata of the gateway's calls of Tokenize and Detokenize: the name of the caller, in UTF-8.
CALLER_METADATA = "mixtral-caller-bin"
# Initial metadata of an answer that is not held to all that was asked of it.
WEAKENED_METADATA = "mixtral-weakened"
# gRPC's name for a serialized google.rpc.Status.
DETAILS_METADATA = "grpc-status-details-bin"
# Characters of a text in the details, which metadata must have room for.
_MAX_TEXT = 1000


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
        openai_code: Its code in the bodies of OpenAI's API.
        retry_after: Seconds to wait before a retry; None where a retry does not help.
    """

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    azure_code: ClassVar[str] = "InternalServerError"
    openai_code: ClassVar[str] = "server_error"
    retry_after: int | None = None

    @property
    def retry_after_ms(self) -> int | None:
        """The same in milliseconds, more precisely where that is known."""
        return None if self.retry_after is None else 1000 * self.retry_after


class InvalidRequest(ServingError):
    """The request is malformed."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    azure_code = "BadRequest"
    openai_code = "invalid_request"


class ContextTooLong(InvalidRequest):
    """Prompt and answer together exceed the model's context.

    Args:
        message: The message for the caller.

    Attributes:
        parameter: The parameter that has the prompt, in the client's words, where it is known.
    """

    azure_code = "context_length_exceeded"
    openai_code = "context_length_exceeded"
    parameter: str | None = None

    @classmethod
    def of(cls, context: int, excess: str) -> "ContextTooLong":
        """Returns the error in the words of OpenAI's API, which agents look for in messages.

        Args:
            context: Tokens that the context holds.
            excess: What is too long, such as "the prompt has 9 tokens".
        """
        return cls(
            f"This model's maximum context length is {context} tokens. However, {excess}. The "
            "prompt is too long: please reduce the length of the messages."
        )


class RequestTooLarge(InvalidRequest):
    """The body or message is larger than the server reads."""

    http_status = 413
    azure_code = "RequestEntityTooLarge"
    openai_code = "request_too_large"


class UnsupportedMedia(InvalidRequest):
    """The body is no JSON, or it is compressed."""

    http_status = 415
    azure_code = "UnsupportedMediaType"
    openai_code = "unsupported_media_type"


@dataclass(frozen=True)
class Problem:
    """A mistake in one parameter.

    Attributes:
        kind: A name for programs, such as pydantic's "less_than_equal".
        path: The way to the parameter, such as ("body", "messages", "0", "role").
        message: A sentence for people.
        value: The wrong value.
        pointer: The JSON pointer (RFC 6901) of the mistake within the parameter, if that is a
            schema.
    """

    kind: str
    path: tuple[str, ...]
    message: str
    value: object
    pointer: str = ""


class InvalidParameter(InvalidRequest):
    """The type, range or name of a parameter is wrong.

    Args:
        message: The message for the caller.
        problems: Every mistake, where they are known. Their values do not cross gRPC.
    """

    http_status = 422
    azure_code = "Invalid input"
    openai_code = "invalid_value"

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class UnsupportedParameter(InvalidParameter):
    """A known parameter asks for a feature that this server does not have."""

    azure_code = "parameter_not_supported"
    openai_code = "unsupported_parameter"


class Unauthenticated(ServingError):
    """The caller has shown no key or token, or a wrong one."""

    grpc_status = "UNAUTHENTICATED"
    http_status = 401
    azure_code = "Unauthorized"
    openai_code = "invalid_api_key"


class Forbidden(ServingError):
    """The caller is known, but not allowed to do this."""

    grpc_status = "PERMISSION_DENIED"
    http_status = 403
    azure_code = "Forbidden"
    openai_code = "permission_denied"


class NotFound(ServingError):
    """There is no such route."""

    grpc_status = "NOT_FOUND"
    http_status = 404
    azure_code = "NotFound"
    openai_code = "not_found"


class ModelNotFound(NotFound):
    """Neither the model nor one of its adapters has the name that was asked for.

    The codes are those of Azure's endpoints that serve several models, and of OpenAI's API.
    """

    azure_code = "unknown_model"
    openai_code = "model_not_found"
    parameter: ClassVar[str] = "model"

    @classmethod
    def of(cls, name: str, served: str) -> "ModelNotFound":
        """Returns the error for a name that was asked for.

        Args:
            name: The name; the text shows its first 100 characters.
            served: The name of the served model.
        """
        return cls(
            f"The model '{name[:100]}' does not exist: this endpoint serves '{served}' and the "
            "adapters that GET /v1/models lists"
        )


class MethodNotAllowed(ServingError):
    """The route exists, but not with this method."""

    grpc_status = "UNIMPLEMENTED"
    http_status = 405
    azure_code = "MethodNotAllowed"
    openai_code = "method_not_allowed"


class DeadlineExceeded(ServingError):
    """The caller's deadline has passed."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 408
    azure_code = "RequestTimeout"
    openai_code = "timeout"


class Overloaded(ServingError):
    """The queue is full, or the caller has used up its minute.

    Args:
        message: The message for the caller.
        retry_after: Seconds to wait, where they are known.
    """

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429
    azure_code = "TooManyRequests"
    openai_code = "rate_limit_exceeded"
    retry_after = 1

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self._seconds = retry_after
        self.retry_after = math.ceil(retry_after)

    @property
    def retry_after_ms(self) -> int:
        """The milliseconds to wait."""
        return math.ceil(1000 * self._seconds)


class EngineFailure(ServingError):
    """The model failed; a retry does not help."""

    grpc_status = "INTERNAL"
    http_status = 424
    azure_code = "ModelError"
    openai_code = "model_error"


class Unavailable(ServingError):
    """The server is not ready, drains or is gone; a retry helps."""

    grpc_status = "UNAVAILABLE"
    http_status = 503
    azure_code = "ServiceUnavailable"
    openai_code = "service_unavailable"
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
        ModelNotFound,
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


def to_grpc(error: ServingError) -> tuple[tuple[str, str | bytes], ...]:
    """Returns the trailing metadata of a call that ends with the error: its name and details."""
    from google.rpc import code_pb2, error_details_pb2, status_pb2

    message = str(error)[:_MAX_TEXT]
    status = status_pb2.Status(code=code_pb2.Code.Value(error.grpc_status), message=message)
    if error.retry_after_ms is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(retry)
    if isinstance(error, InvalidParameter):
        bad = error_details_pb2.BadRequest()
        for problem in error.problems:
            # Google's names of fields do not say how to point into a text; URIs do it so.
            field = ".".join(problem.path) + ("#" + problem.pointer if problem.pointer else "")
            bad.field_violations.add(field=field, description=problem.message[:_MAX_TEXT])
        if not error.problems:  # the text begins with the parameter's name
            bad.field_violations.add(field=message.partition(" ")[0], description=message)
        status.details.add().Pack(bad)
    name = type(error).__name__
    return ((ERROR_METADATA, name), (DETAILS_METADATA, status.SerializeToString()))


def from_grpc(
    status: str, message: str, trailing: Iterable[tuple[str, str | bytes]] = ()
) -> ServingError:
    """Rebuilds the error of a failed call.

    Args:
        status: The name of its gRPC status.
        message: Its details.
        trailing: Its trailing metadata, in which a name and details of `to_grpc` may be.
    """
    metadata = dict(trailing)
    name = metadata.get(ERROR_METADATA)
    kind = LEAVES.get(str(name)) or _BY_STATUS.get(status, EngineFailure)
    seconds, problems = _details(metadata.get(DETAILS_METADATA))
    if issubclass(kind, InvalidParameter):
        return kind(message, problems)
    if issubclass(kind, Overloaded) and seconds is not None:
        return kind(message, seconds)
    return kind(message)


def _problem(field: str, description: str) -> Problem:
    """Returns the problem of a violation, whose field may have a JSON pointer behind a `#`."""
    name, _, pointer = field.partition("#")
    path = ("body", *name.split("."))
    return Problem(InvalidParameter.azure_code, path, description, None, pointer)


def _details(content: str | bytes | None) -> tuple[float | None, list[Problem]]:
    """Returns the seconds of RetryInfo and the problems of BadRequest in a google.rpc.Status."""
    if not isinstance(content, bytes):
        return None, []
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    seconds, problems = None, []
    retry, bad = error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    try:
        for detail in status_pb2.Status.FromString(content).details:
            if detail.Unpack(retry):
                seconds = retry.retry_delay.ToMilliseconds() / 1000
            elif detail.Unpack(bad):
                problems = [
                    _problem(violation.field, violation.description)
                    for violation in bad.field_violations
                ]
    except DecodeError:  # of somebody else, such as a proxy
        return None, []
    return seconds, problems
