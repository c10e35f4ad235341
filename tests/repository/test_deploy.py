"""Manifests name flags that exist, ports that are opened, routes that answer, and one another."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFESTS = sorted(DEPLOY.glob("kubernetes/*.yaml"))
COMMANDS = {
    "mixtral-jax serve": ["-m", "mixtral_jax.cli", "serve"],
    "python -m serving": ["-m", "serving"],
    "python -m serving.gateway": ["-m", "serving.gateway"],
}


def documents(manifest: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifest.read_text()))


def pod_of(document: dict[str, Any]) -> dict[str, Any] | None:
    spec = document["spec"]
    template = spec.get("template") or spec.get("leaderWorkerTemplate", {}).get("workerTemplate")
    return template


def containers() -> list[Any]:
    found = []
    for manifest in MANIFESTS:
        for document in documents(manifest):
            if pod := pod_of(document):
                found += [
                    pytest.param(pod, container, id=f"{manifest.stem}-{container['name']}")
                    for container in pod["spec"]["containers"]
                ]
    return found


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    wide = {**os.environ, "COLUMNS": "300", "TERM": "dumb"}
    found = {}
    for name, command in COMMANDS.items():
        call = [sys.executable, *command, "--help"]
        text = subprocess.run(call, capture_output=True, text=True, check=True, env=wide).stdout
        found[name] = set(re.findall(r"--[a-z][a-z-]+", text))
    return found


def test_there_are_manifests_for_each_way_to_run() -> None:
    names = {path.stem for path in MANIFESTS}
    assert names == {"single-gpu", "tpu-leaderworkerset", "replicas"}


@pytest.mark.parametrize(("pod", "container"), containers())
def test_a_container(
    pod: dict[str, Any], container: dict[str, Any], flags: dict[str, set[str]]
) -> None:
    line = " ".join(["mixtral-jax", *container["args"]])
    if "command" in container:
        line = " ".join([*container["command"], *container["args"]]).removeprefix("sh -c exec ")
    command = max((name for name in COMMANDS if line.startswith(name)), key=len)
    given = dict(re.findall(r"(--[a-z-]+)=(\S+)", line))
    assert given and set(given) <= flags[command]

    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    usual = {"http": 8000, "grpc": 50051}
    assert ports == {**{name: usual[name] for name in usual if name in ports}, **ports}
    assert int(given.get("--port", ports.get("http", 0))) in ports.values()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if asked := container.get(probe, {}).get("httpGet"):
            assert asked["port"] in ports and asked["path"] in ("/health/live", "/health/ready")
    patience = pod["spec"]["terminationGracePeriodSeconds"]
    assert float(given["--drain-seconds"]) < patience
    volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
    assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_services_and_selectors_find_their_pods(manifest: Path) -> None:
    found = documents(manifest)
    pods = [pod for document in found if (pod := pod_of(document))]
    labels = [pod["metadata"]["labels"] for pod in pods]
    for document in found:
        selector = document["spec"].get("selector", {})
        wanted = selector.get("matchLabels", selector)
        if wanted and not any(name.startswith("leaderworkerset") for name in wanted):
            assert any(wanted.items() <= one.items() for one in labels)
        if document["kind"] == "Service":
            names = {
                port["name"]
                for pod in pods
                for c in pod["spec"]["containers"]
                for port in c["ports"]
            }
            assert {port["targetPort"] for port in document["spec"]["ports"]} <= names


def test_the_image_serves_what_the_manifests_probe() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert "USER 10001" in text and "-c constraints.txt" in text
    assert set(re.findall(r"EXPOSE (.*)", text)) == {"8000 50051"}
    assert "/health/live" in text
