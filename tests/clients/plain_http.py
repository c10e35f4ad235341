"""requests and curl, as the seed's pages show them."""

import json
import os
import subprocess

import requests

URL, KEY = os.environ["ENDPOINT"], os.environ["KEY"]
HISTORY = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]


def post(path: str, body: object, **headers: str) -> requests.Response:
    return requests.post(
        f"{URL}{path}", json=body, headers={"Authorization": f"Bearer {KEY}", **headers}, timeout=60
    )


def events(text: str) -> list[dict]:
    pieces = text.split("\n\n")
    assert pieces.pop() == "" and pieces.pop() == "data: [DONE]"
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces]


info = requests.get(f"{URL}/info", headers={"api-key": KEY}, timeout=60).json()
assert info["model_type"] == "chat-completions"
answer = post("/chat/completions", {"messages": HISTORY, "max_tokens": 4, "temperature": 0})
assert answer.status_code == 200, answer.text
chat = answer.json()

# The linked notebook: the key without a scheme, the boolean as a string.
streamed = requests.post(
    f"{URL}/v1/chat/completions",
    json={"messages": HISTORY, "max_tokens": 4, "temperature": 0, "stream": "True"},
    headers={"Authorization": KEY, "Content-Type": "application/json"},
    timeout=60,
)
assert streamed.headers["content-type"] == "text/event-stream"
chunks = events(streamed.text)
text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
assert text == chat["choices"][0]["message"]["content"]
# The second request finds its prompt in the cache, which OpenAI's paths tell.
usage = dict(chunks[-1]["usage"])
usage.pop("prompt_tokens_details", None)
assert usage == chat["usage"]

extras = {"messages": HISTORY, "max_tokens": 4, "n": 2, "logprobs": True}
refused = post("/chat/completions", extras)
assert refused.status_code == 400
assert "Extra parameters ['n', 'logprobs'] are not allowed" in refused.text
assert post("/chat/completions", extras, **{"extra-parameters": "drop"}).status_code == 200
passed = post("/chat/completions", extras, **{"extra-parameters": "pass-through"})
assert len(passed.json()["choices"]) == 2 and passed.json()["choices"][0]["logprobs"]["content"]
bad = post("/chat/completions", {"messages": HISTORY, "top_p": 7})
assert bad.status_code == 422 and bad.json()["error"]["status"] == 422, bad.text
wrong = requests.get(f"{URL}/info", headers={"Authorization": "Bearer wrong"}, timeout=60)
assert wrong.status_code == 401 and wrong.headers["www-authenticate"].startswith("Bearer")

curl = ["curl", "--silent", "--show-error", "--no-buffer", "--max-time", "60"]
curl += ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
body = json.dumps({"messages": HISTORY, "max_tokens": 4, "temperature": 0, "stream": True})
said = subprocess.run(
    [*curl, f"{URL}/chat/completions", "-d", body], capture_output=True, text=True, check=True
).stdout
text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in events(said))
assert text == chat["choices"][0]["message"]["content"]
