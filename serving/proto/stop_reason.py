"""The end of a choice that its caller named, read alike by the gateway and by the client."""

from serving.proto import inference_pb2 as pb


def stop_reason(chunk: pb.GenerateChunk) -> str | int | None:
    """Returns the text or the id of the caller that ended a choice; None if neither did."""
    kind = chunk.WhichOneof("stop_reason")
    reason: str | int | None = None if kind is None else getattr(chunk, kind)
    return reason
