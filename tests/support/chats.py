"""Bodies of chat requests, read as the gateway reads them."""

import json
from typing import Any

from serving.gateway.dialect.azure import ExtraParameters
from serving.gateway.dialect.chat.request import ChatRequest
from serving.gateway.dialect.parsing import UnknownFields, read
from serving.proto import inference_pb2

HELLO = [{"role": "user", "content": "hello"}]
REFUSE = ExtraParameters.REFUSE.apply
DROP = ExtraParameters.DROP.apply
PASS = ExtraParameters.PASS.apply


def asked(unknown: UnknownFields = REFUSE, **parameters: Any) -> inference_pb2.GenerateRequest:
    """Returns the call that a chat of `HELLO` becomes, with parameters that may replace it."""
    body = json.dumps({"messages": HELLO} | parameters).encode()
    (request,) = read(body, ChatRequest, unknown).protos()
    return request
