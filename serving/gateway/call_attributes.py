"""Attributes of the spans of calls, by OpenTelemetry's conventions for generative AI.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from collections.abc import Sequence

from serving.proto import inference_pb2


def server_attributes(target: str) -> dict[str, str | int]:
    """Returns the attributes of a span that name the server, by gRPC's name of it."""
    address, _, port = target.rpartition(":")
    if port.isdecimal() and "," not in target:
        return {"server.address": address, "server.port": int(port)}
    return {"server.address": target}


def call_attributes(
    operation: str, asked_model: str, message: inference_pb2.GenerateRequest
) -> dict[str, str | int | float | bool | Sequence[str]]:
    """Returns the attributes of a span that names a call.

    Stop texts are left out, because no text of a request is in a span.

    Args:
        operation: "chat" or "text_completion", as OpenTelemetry names them.
        asked_model: The model that the client asked for.
        message: The call.
    """
    attributes: dict[str, str | int | float | bool | Sequence[str]] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "mixtral_jax",
        "gen_ai.output.type": "text",
        "gen_ai.request.model": asked_model,
    }
    if message.HasField("max_tokens"):
        attributes["gen_ai.request.max_tokens"] = message.max_tokens
    if message.n > 1:
        attributes["gen_ai.request.choice.count"] = message.n
    sampling = message.sampling
    for name in ("temperature", "top_p", "seed"):
        if sampling.HasField(name):
            attributes[f"gen_ai.request.{name}"] = _short(getattr(sampling, name))
    for name in ("top_k", "presence_penalty", "frequency_penalty"):
        if value := getattr(sampling, name):
            attributes[f"gen_ai.request.{name}"] = _short(value)
    return attributes


def _short(value: float) -> float:
    """Returns a float32 as the client wrote it: 0.7, where the proto has 0.699999988."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
