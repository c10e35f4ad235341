"""The page that our users follow: its samples, unchanged, against our endpoint.

The samples of a language build upon one another, so that each language is one program, run with the
endpoint and the key in the environment as the page says. Known to be broken, and why:

* python, "explore parameters": releases after 1.0.0b6 of the package took the class away that it
  imports, so that 1.0.0b6 is what runs here.
* javascript, "stream content": the sample asks for a stream of bytes on its own side but does not
  send `stream: true`; no server can know, and it prints nothing. It imports no `createSseStream`.
* csharp: there is no .NET here; tests/serving/gateway replays what its package sends.
"""

import json
import re
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.client_envs import run_node, run_python
from tests.support.identity import Identity, surroundings
from tests.support.servers import Server

PAGE = Path(__file__).parents[3] / "shared" / "seed.md"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAGE.exists(), reason="the page is not beside this checkout"),
]
CREDENTIALS = ["key", pytest.param("default credential", marks=pytest.mark.soak)]


def samples(language: str, kind: str) -> list[str]:
    """The fenced blocks of a kind in the part of the page for a programming language."""
    start = f'::: zone pivot="programming-language-{language}"'
    part = PAGE.read_text().split(start)[1].split("::: zone-end")[0]
    return re.findall(rf"^```{kind}\n(.*?)^```", part, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("credential", CREDENTIALS)
def test_python(
    credential: str, secure: Server, pem: Path, identity: Identity, tmp_path: Path
) -> None:
    by_key, by_credential, *rest = samples("python", "python")
    assert "AzureKeyCredential" in by_key and "DefaultAzureCredential" in by_credential
    assert len(rest) == 9
    client = by_key if credential == "key" else by_credential
    script = tmp_path / "page.py"
    script.write_text("\n".join([client, *rest, 'print("extras:", response.choices[0])']))
    said = run_python("azure-b6", script, surroundings(secure, pem, identity, credential))
    assert "Model name: SmolLM2-135M-Instruct\nModel type: chat-completions\n" in said
    assert re.search(r"Response: \S.*Usage:\n\tPrompt tokens: \d+\n", said, re.DOTALL)
    streamed = said.split("Completion tokens:")[1].split("extras:")[0].partition("\n")[2]
    assert len(streamed) > 20, said
    assert "'logprobs': {'content': [{'token': " in said


@pytest.mark.parametrize("credential", CREDENTIALS)
def test_javascript(
    credential: str, secure: Server, pem: Path, identity: Identity, tmp_path: Path
) -> None:
    by_key, by_credential, *rest = samples("javascript", "javascript")
    assert "AzureKeyCredential" in by_key and "DefaultAzureCredential" in by_credential
    info, show_info, ask, show, stream, show_stream, explore, extras = rest
    fail = "if (isUnexpected(response)) throw new Error(JSON.stringify(response.body));"
    shown = 'console.log("logprobs:", response.body.choices[0].logprobs.content.length);'
    # What the sample leaves out, so that a stream is one.
    asked = stream.replace("messages: messages,", "messages: messages, stream: true,")
    assert asked != stream
    steps = [
        info + show_info,
        ask + show,
        stream + show_stream,
        'console.log("streamed:");' + asked + show_stream,
        explore + fail,
        extras + fail + shown,
    ]
    script = tmp_path / "page.mjs"
    script.write_text(
        'import { createSseStream } from "@azure/core-sse";\n'
        + (by_key if credential == "key" else by_credential)
        + "".join(f"await (async () => {{\n{step}\n}})();\n" for step in steps)
    )
    said = run_node(script, surroundings(secure, pem, identity, credential))
    assert "Model name:  SmolLM2-135M-Instruct\nModel type:  chat-completions\n" in said
    assert re.search(r"Response:  \S.*Usage:\n\tPrompt tokens: \d+\n", said, re.DOTALL)
    before, _, streamed = said.partition("streamed:\n")
    assert re.search(r"Completion tokens: \d+\n$", before), "the sample as it stands prints nothing"
    assert len(streamed.partition("logprobs:")[0]) > 20, said
    assert re.search(r"logprobs: [1-9]", said)


def test_rest(secure: Server, pem: Path) -> None:
    heads = samples("rest", "http")
    blocks = [json.loads(block) for block in samples("rest", "json")]
    info, *others = blocks
    bodies = [block for block in others if "messages" in block]
    completion, first, last, _ = [block for block in others if "messages" not in block]
    assert len(heads) == 2 and len(bodies) == 4

    with httpx.Client(verify=ssl.create_default_context(cafile=pem), timeout=120) as client:

        def send(head: str, body: Any = None) -> httpx.Response:
            line, *headers = head.strip().splitlines()
            method, path, _ = line.split(" ")
            given = dict(header.split(": ", 1) for header in headers)
            given["Authorization"] = given["Authorization"].replace("<TOKEN>", secure.key)
            del given["Host"]
            return client.request(method, secure.url + path, headers=given, json=body)

        answer = send(heads[0])
        assert answer.status_code == 200
        # What its clients read, and what holds where a request is silent.
        assert answer.json().keys() - info.keys() == {"default_sampling_params"}
        assert info.keys() <= answer.json().keys()
        ask = heads[1].replace("extra-parameters: pass-through\n", "")
        assert ask != heads[1]
        for body in (bodies[0], bodies[2]):
            answer = send(ask, body)
            assert answer.status_code == 200, answer.text
            assert shape(answer.json()) == shape(completion)
        answer = send(ask, bodies[1])
        *events, done, end = answer.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert shape(chunks[0]) == shape(first)
        assert shape(chunks[-1]) == shape(last)
        answer = send(heads[1], bodies[3])
        assert answer.json()["choices"][0]["logprobs"]["content"], answer.text


def shape(value: Any) -> Any:
    """A JSON value with its scalars left out."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else None
