"""A recorder: an HTTP server that keeps what clients send and answers as their APIs would.

Answers are fixed: a call where one is forced, an object where JSON is asked for, a text otherwise.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.recorded_answers import (
    chat_answer,
    chat_chunks,
    message_answer,
    message_events,
    response_answer,
    response_events,
    text_answer,
)

_INFO = {"model_name": "m", "model_type": "chat-completions", "model_provider_name": "p"}


@dataclass
class Recording:
    """What was asked of a recorder: (call, path, body) in the order of arrival."""

    url: str
    step_file: Path
    """Where a client's script writes the name of the call that follows."""
    requests: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def recording(folder: Path) -> Iterator[Recording]:
    """Serves on a free port of 127.0.0.1 until the block ends; `folder` holds the steps' file."""
    made: list[Recording] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(_INFO if "/info" in self.path else {"object": "list", "data": []})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            (record,) = made
            call = record.step_file.read_text(encoding="utf-8")
            record.requests.append({"call": call, "path": self.path, "body": body})
            path = self.path.split("?")[0]
            is_response = path.endswith("/responses")
            is_message = path.endswith("/v1/messages")
            if is_message and "thread" in body:  # as the gateway does, which keeps nothing
                details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
                error = {"type": "invalid_request_error", "message": "no", "details": details}
                self._answer({"type": "error", "error": error}, 400)
            elif is_message and body.get("stream"):
                self._stream(message_events(body), with_names=True)
            elif is_message:
                self._answer(message_answer(body))
            elif path.endswith("/v1/completions"):
                self._answer(text_answer(body))
            elif body.get("stream"):
                events = response_events(body) if is_response else chat_chunks(body)
                self._stream(events, with_names=is_response)
            else:
                self._answer(response_answer(body) if is_response else chat_answer(body))

        def _answer(self, value: dict[str, Any], status: int = 200) -> None:
            payload = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def _stream(self, events: list[dict[str, Any]], *, with_names: bool) -> None:
            payload = b""
            for event in events:
                name = f"event: {event['type']}\n" if with_names else ""
                payload += f"{name}data: {json.dumps(event)}\n\n".encode()
            payload += b"" if with_names else b"data: [DONE]\n\n"
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    step_file = folder / "step"
    step_file.write_text("", encoding="utf-8")
    made.append(Recording(f"http://127.0.0.1:{server.server_port}", step_file))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made[0]
    finally:
        server.shutdown()
        server.server_close()
