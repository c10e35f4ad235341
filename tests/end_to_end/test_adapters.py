"""`mixtral-jax serve` with adapters: each answers as the model that it is merged into.

One server has an adapter of the start, and follows a folder into which others are put.
"""

import asyncio
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mixtral_jax.checkpoint.adapter import write_adapter
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.generation import generate_tokens
from mixtral_jax.model.adapter import AdapterConfig
from serving.client import AsyncClient, Client
from serving.client.types import Completion
from serving.errors import ModelNotFound
from tests.support.adapters import random_adapter
from tests.support.merged_models import merged_model
from tests.support.models import model_of
from tests.support.servers import Server, environment, free_ports, running, serve_command

pytestmark = pytest.mark.slow

PATIENCE = 60.0
BASE = "tiny-random"
CARD = open_pretrained(BASE).card
SETTINGS = AdapterConfig(targets=("q", "v", "router", "up", "down"), rank=4, alpha=8.0)
PROMPT = [1, *range(40, 60)]
LENGTH = 10
OPTIONS: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
SEEDS = {"fixed": 1, "one": 2, "two": 3}


def write(folder: Path, seed: int) -> Path:
    adapter = random_adapter(CARD.model, SETTINGS, seed=seed, size=0.3)
    write_adapter(folder, adapter, SETTINGS, base="some/base")
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[int, ...]]:
    """The greedy answers of the model and of those with an adapter merged in, by the plain loop."""
    models = {BASE: model_of(CARD.model)}
    for name, seed in SEEDS.items():
        adapter = random_adapter(CARD.model, SETTINGS, seed=seed, size=0.3)
        models[name] = merged_model(CARD.model, adapter, SETTINGS)
    answers = {
        name: tuple(generate_tokens(model, PROMPT, max_tokens=LENGTH))
        for name, model in models.items()
    }
    assert len(set(answers.values())) == len(answers)
    return answers


@dataclass
class Adapted:
    """A server with the adapter "fixed", and the folder that it follows."""

    server: Server
    folder: Path
    metrics: str

    @property
    def grpc(self) -> Client:
        return Client(self.server.target, key=self.server.key)

    @property
    def http(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.server.url}/v1", api_key=self.server.key, max_retries=0
        )

    def names(self) -> list[str]:
        with self.http as client:
            return [model.id for model in client.models.list()]

    def figures(self) -> dict[str, float]:
        """The service's figures of adapters, and of compilations."""
        text = httpx.get(self.metrics, trust_env=False, timeout=PATIENCE).text
        lines = re.findall(r"^(mixtral_\S*(?:adapter|compilation)\S*) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in lines}

    def put(self, name: str) -> None:
        """Writes an adapter beside the folder's others, and gives it its name at last."""
        place = write(self.folder / ".new", SEEDS[name])
        place.rename(self.folder / name)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    place = tmp_path_factory.mktemp("adapters")
    folder = place / "followed"
    folder.mkdir()
    (port,) = free_ports(1)
    options = [
        *(f"--adapter=fixed={write(place / 'fixed', SEEDS['fixed'])}", "--max-adapters=2"),
        *(f"--adapters-folder={folder}", "--max-adapter-rank=4", f"--metrics-port={port}"),
        *("--max-sequences=4", "--max-step-tokens=16"),
    ]
    with running(serve_command(BASE, *options)) as server:
        yield Adapted(server, folder, f"http://127.0.0.1:{port}/metrics")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_model_and_adapters_answer_as_merged_models_in_one_batch(
    adapted: Adapted, expected: dict[str, tuple[int, ...]]
) -> None:
    adapted.put("one")
    until(lambda: adapted.names() == [BASE, "fixed", "one"])
    names = [BASE, "fixed", "one"] * 4

    async def ask() -> list[Completion]:
        async with AsyncClient(adapted.server.target, key=adapted.server.key) as client:
            asked = (client.complete(PROMPT, model=name, **OPTIONS) for name in names)
            return await asyncio.gather(*asked)

    for name, answer in zip(names, asyncio.run(ask()), strict=True):
        assert tuple(answer.choices[0].token_ids) == expected[name]
    with adapted.grpc as client:
        assert client.info().adapters == ("fixed", "one")
        texts = {name: client.complete(PROMPT, model=name, **OPTIONS).text for name in set(names)}
        with pytest.raises(ModelNotFound, match="'nobody'"):
            client.complete(PROMPT, model="nobody", **OPTIONS)
    extra = {"ignore_eos": True}
    with adapted.http as http:
        for name in texts:
            options: Any = {"max_tokens": LENGTH, "temperature": 0, "extra_body": extra}
            text = http.completions.create(model=name, prompt=PROMPT, **options)
            assert (text.model, text.choices[0].text) == (name, texts[name])
        messages: Any = [{"role": "user", "content": "Hello!"}]
        stream = http.chat.completions.create(
            model="one", messages=messages, max_tokens=4, stream=True
        )
        assert {chunk.model for chunk in stream} == {"one"}
        with pytest.raises(openai.NotFoundError) as caught:
            http.chat.completions.create(model="nobody", messages=messages)
        assert caught.value.code == "model_not_found"
        shown = {model.id: getattr(model, "parent", "") for model in http.models.list()}
    assert shown == {BASE: None, "fixed": BASE, "one": BASE}
    figures = adapted.figures()
    assert figures['mixtral_adapter_requests_total{adapter="one",model_name="tiny-random"}'] == 7
    assert figures["mixtral_compilations_total"] == 0
    headers = {"api-key": adapted.server.key}
    usage = httpx.get(
        f"{adapted.server.url}/usage", headers=headers, trust_env=False, timeout=PATIENCE
    ).json()
    parts = [part for day in usage["data"] for part in day.get("adapters", [])]
    assert {part["adapter"] for part in parts} >= {"fixed", "one"}


def test_adapters_come_and_go_while_the_server_runs(
    adapted: Adapted, expected: dict[str, tuple[int, ...]]
) -> None:
    shutil.rmtree(adapted.folder / "one", ignore_errors=True)
    until(lambda: adapted.names() == [BASE, "fixed"])
    with adapted.grpc as client:
        with pytest.raises(ModelNotFound, match="'one'"):
            client.complete(PROMPT, model="one", **OPTIONS)
        adapted.put("two")
        until(lambda: client.info().adapters == ("fixed", "two"))
        answer = client.complete(PROMPT, model="two", **OPTIONS)
        assert tuple(answer.choices[0].token_ids) == expected["two"]
        # The same name, another adapter: no prefix of the older one is found.
        shutil.rmtree(adapted.folder / "two")
        write(adapted.folder / ".new", SEEDS["one"]).rename(adapted.folder / "two")

        def answers() -> bool:
            try:
                answer = client.complete(PROMPT, model="two", **OPTIONS)
            except ModelNotFound:
                return False
            return tuple(answer.choices[0].token_ids) == expected["one"]

        until(answers)
        # A broken one, and one more than there is room for, change nothing.
        broken = write(adapted.folder / ".new", SEEDS["one"])
        weights = broken / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
        broken.rename(adapted.folder / "broken")
        adapted.put("one")
        until(lambda: adapted.figures()["mixtral_failed_adapters"] == 2)
        assert client.info().adapters == ("fixed", "two")
        for name in (BASE, "fixed"):
            answer = client.complete(PROMPT, model=name, **OPTIONS)
            assert tuple(answer.choices[0].token_ids) == expected[name]
    ready = f"{adapted.server.url}/health/ready"
    until(lambda: httpx.get(ready, trust_env=False, timeout=PATIENCE).status_code == 200)
    figures = adapted.figures()
    assert figures["mixtral_adapters"] == 2 and figures["mixtral_compilations_total"] == 0


def test_a_broken_adapter_of_the_start_is_one_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "broken", 1)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    command = serve_command(BASE, f"--adapter=mine={folder}")
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr and str(weights) in ended.stderr
