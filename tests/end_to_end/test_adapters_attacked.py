"""Adapters that come, change and go under load, and names that nothing has."""

import asyncio
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from mixtral_jax.checkpoint.adapter import write_adapter
from mixtral_jax.checkpoint.pretrained import open_pretrained
from mixtral_jax.generation import generate_tokens
from mixtral_jax.model.adapter import AdapterConfig
from serving.client import AsyncClient
from serving.errors import ModelNotFound, Overloaded
from tests.support.adapters import random_adapter
from tests.support.merged_models import merged_model
from tests.support.models import model_of
from tests.support.servers import Server, free_ports, running, serve_command

pytestmark = pytest.mark.soak

BASE = "tiny-random"
CONFIG = open_pretrained(BASE).card.model
SETTINGS = AdapterConfig(targets=("q", "v", "router", "up", "down"), rank=4, alpha=8.0)
PROMPT = [1, *range(40, 80)]  # of several pages, so that prefixes are found
LENGTH = 40
VERSIONS = ("1", "2", "3")
SECONDS = 25.0


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, ...], str]:
    """Whose greedy answer each is: the model's, or that of a version of the adapter."""
    models = {BASE: model_of(CONFIG)}
    for version in VERSIONS:
        adapter = random_adapter(CONFIG, SETTINGS, seed=int(version), size=0.3)
        models[version] = merged_model(CONFIG, adapter, SETTINGS)
    answers = {tuple(generate_tokens(m, PROMPT, max_tokens=LENGTH)): n for n, m in models.items()}
    assert len(answers) == len(models)
    return answers


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("followed")
    for version in VERSIONS:
        adapter = random_adapter(CONFIG, SETTINGS, seed=int(version), size=0.3)
        write_adapter(folder / f".{version}", adapter, SETTINGS, base="some/base")
    return folder


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def server(followed: Path, metrics_port: int) -> Iterator[Server]:
    options = [
        *(f"--adapters-folder={followed}", "--max-adapters=3", "--max-adapter-rank=4"),
        *(f"--metrics-port={metrics_port}", "--max-sequences=8", "--max-step-tokens=32"),
    ]
    with running(serve_command(BASE, *options)) as server:
        yield server


def series(port: int) -> set[str]:
    """The names and labels of all figures."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    return {line.rpartition(" ")[0] for line in text.splitlines() if line[:1] not in ("", "#")}


def switch(folder: Path, name: str, version: str) -> None:
    """Gives a name another version, both of its files at once."""
    link = folder / ".new"
    link.symlink_to(f".{version}")
    os.replace(link, folder / name)


async def change(folder: Path, until: float) -> None:
    """Switches one adapter, lets a second come and go, and copies a third file by file."""
    for turn in itertools.count():
        if time.monotonic() > until:
            return
        switch(folder, "one", VERSIONS[turn % 3])
        if turn % 4 == 0:
            switch(folder, "two", VERSIONS[turn % 2])
        elif turn % 4 == 2:
            (folder / "two").unlink()
        if turn % 6 == 0:
            shutil.rmtree(folder / "three", ignore_errors=True)
            (folder / "three").mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            content = (folder / f".{VERSIONS[turn // 2 % 3]}" / file).read_bytes()
            with (folder / "three" / file).open("wb") as copy:
                copy.write(content[: len(content) // 2])
                copy.flush()
                await asyncio.sleep(0.4)
                copy.write(content[len(content) // 2 :])
        await asyncio.sleep(1.0)


def test_no_answer_mixes_versions(
    server: Server, followed: Path, expected: dict[tuple[int, ...], str], metrics_port: int
) -> None:
    seen: dict[str, Counter[str]] = {name: Counter() for name in (BASE, "one", "two", "three")}
    until = time.monotonic() + SECONDS

    async def ask(client: AsyncClient, name: str) -> None:
        while time.monotonic() < until:
            options: dict[str, Any] = {"max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
            try:
                answer = await client.complete(PROMPT, model=name, **options)
            except (ModelNotFound, Overloaded) as error:
                seen[name][type(error).__name__] += 1
                await asyncio.sleep(0.05)
                continue
            seen[name][expected.get(tuple(answer.choices[0].token_ids), "mixed")] += 1

    async def run() -> None:
        async with AsyncClient(server.target, key=server.key) as client:
            asking = (ask(client, name) for name in seen for _ in range(4))
            await asyncio.gather(change(followed, until), *asking)

    asyncio.run(run())
    assert set(seen[BASE]) == {BASE}, seen
    for name in ("one", "two", "three"):
        assert set(seen[name]) <= {*VERSIONS, "ModelNotFound", "Overloaded"}, seen
    assert len(set(seen["one"]) & set(VERSIONS)) == 3, seen
    text = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", trust_env=False).text
    assert "mixtral_compilations_total 0.0" in text
    assert "mixtral_failed_steps_total 0.0" in text
    assert "mixtral_adapter_load_failures_total 0.0" in text, [*server.said][-20:]


def test_a_thousand_unknown_names_are_404_and_leave_nothing(
    server: Server, metrics_port: int
) -> None:
    strange = [
        "../../etc/passwd",
        "a/b/c",
        "ü" * 50,
        "\x00",
        "a\nb",
        "x" * 10_000,
        "{}",
        "%s",
        ".1",
    ]
    before = series(metrics_port)
    with httpx.Client(
        base_url=server.url, headers={"api-key": server.key}, trust_env=False, timeout=60
    ) as client:
        message = {"role": "user", "content": "hi"}
        for name in [*strange, *(f"nobody-{i}" for i in range(1000))]:
            answer = client.post(
                "/v1/chat/completions", json={"model": name, "messages": [message], "max_tokens": 1}
            )
            assert answer.status_code in (400, 404), (name[:50], answer.text[:200])
            assert name in strange or answer.status_code == 404
            assert len(answer.content) < 1_000
        for name in strange[:3]:
            answer = client.post(
                f"/openai/deployments/{quote(name, safe='')}/chat/completions",
                json={"messages": [message], "max_tokens": 1},
            )
            assert answer.status_code in (400, 404), (name, answer.text)
        shown = client.get("/v1/models").json()
        assert {model["id"] for model in shown["data"]} <= {BASE, "one", "two", "three"}
        assert client.get("/health/ready").status_code == 200
        usage = json.dumps(client.get("/usage").json())
    assert "nobody" not in usage
    assert not [name for name in series(metrics_port) - before if "nobody" in name]
    assert len(series(metrics_port)) <= len(before) + 5
