"""A client that asks small chats one after the other, in a process of its own.

What it measures must not hang on the interpreter's lock of a process that attacks at the same time.
The key is in `API_KEY`. Each line of its output is the seconds to an answer's first token, or what
went wrong; the end of its input ends it.
"""

import json
import os
import select
import sys
import time

import httpx

PATIENCE = 60.0


def ask(client: httpx.Client, number: int) -> float:
    """Returns the seconds to the first token of a chat that nobody has sent before."""
    message = {"role": "user", "content": f"{number} bystanders ask for little"}
    body = {"messages": [message], "max_tokens": 3, "ignore_eos": True, "stream": True}
    began, first, events = time.monotonic(), None, []
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            events.append(json.loads(line.removeprefix("data: ")))
            for choice in events[-1]["choices"]:
                if first is None and (choice["delta"].get("content") or choice["finish_reason"]):
                    first = time.monotonic() - began
    assert events[-1].get("usage", {}).get("completion_tokens") == 3, events
    assert first is not None
    return first


def main(url: str, pause: float, every: float) -> None:
    """Asks until the input ends: a chat each `every` seconds, with `pause` seconds between two."""
    headers = {"authorization": f"Bearer {os.environ['API_KEY']}"}
    number = 0
    with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE, trust_env=False) as client:
        rest = 0.0
        while not select.select([sys.stdin], [], [], rest)[0]:
            began = time.monotonic()
            try:
                line = json.dumps(ask(client, number))
            except Exception as error:
                line = json.dumps(repr(error))
            print(line, flush=True)
            number += 1
            rest = max(pause, began + every - time.monotonic())


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
