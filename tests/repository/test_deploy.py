"""Manifests name flags that exist, ports that are opened, routes that answer, and one another."""

import json
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


def opened(command: str, given: dict[str, str]) -> dict[str, int]:
    """The ports that a command listens at, by the names that manifests give them."""
    if command == "python -m serving":
        return {"grpc": int(given.get("--port", 50051))}
    ports = {"http": int(given.get("--port", 8000))}
    if command == "mixtral-jax serve":
        ports["grpc"] = int(given.get("--grpc-port", 50051))
        if "--coordinator" in given:
            first = int(given["--coordinator"].rpartition(":")[2].strip('"'))
            ports |= {"coordinator": first, "group": first + 1}
    return ports


def check_probe(name: str, probe: dict[str, Any], ports: dict[str, int]) -> None:
    """Checks that a probe asks a port that is opened and a route that answers."""
    routes = {"livenessProbe": "/health/live"}
    (kind,) = probe.keys() & {"httpGet", "grpc", "exec"}
    match kind:
        case "httpGet":
            assert probe[kind]["port"] == "http" and "http" in ports
            assert probe[kind]["path"] == routes.get(name, "/health/ready")
        case "grpc":
            assert probe[kind]["port"] == ports["grpc"] and name != "livenessProbe"
        case "exec":
            asked = re.findall(r"http://127.0.0.1:(\d+)(/[a-z/]+)", probe[kind]["command"][-1])
            assert asked == [(str(ports["http"]), routes.get(name, "/health/ready"))]


# What pods of ours have; a key that is written wrong is not among them.
KEYS = {
    "pod": {
        *("containers", "volumes", "securityContext", "terminationGracePeriodSeconds"),
        "nodeSelector",
    },
    "container": {
        *("name", "image", "command", "args", "env", "ports", "resources", "volumeMounts"),
        *("startupProbe", "readinessProbe", "livenessProbe", "securityContext"),
    },
    "probe": {
        *("httpGet", "grpc", "exec", "periodSeconds", "timeoutSeconds", "failureThreshold"),
    },
}


@pytest.mark.parametrize(("pod", "container"), containers())
def test_keys_are_those_of_kubernetes(pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert pod["spec"].keys() <= KEYS["pod"]
    assert container.keys() <= KEYS["container"]
    for name, value in container.items():
        if name.endswith("Probe"):
            assert value.keys() <= KEYS["probe"]


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
    assert ports == opened(command, given)
    assert given["--host"] == "0.0.0.0"
    for name in ("startupProbe", "readinessProbe"):
        assert name in container or command == "python -m serving.gateway"
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe := container.get(name):
            check_probe(name, probe, ports)
    patience = pod["spec"]["terminationGracePeriodSeconds"]
    assert float(given["--drain-delay"]) + float(given["--drain-seconds"]) + 10 < patience
    volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
    assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_services_and_selectors_find_their_pods(manifest: Path) -> None:
    found = documents(manifest)
    pods = [pod for document in found if (pod := pod_of(document))]
    labels = [pod["metadata"]["labels"] for pod in pods]
    for document in found:
        selector = document["spec"].get("selector", {})
        selector = selector or document["spec"].get("podSelector", {})
        wanted = selector.get("matchLabels", selector)
        if wanted and not any(name.startswith("leaderworkerset") for name in wanted):
            assert any(wanted.items() <= one.items() for one in labels)
        for rule in document["spec"].get("ingress", ()):
            names = {
                port["name"]
                for pod in pods
                for c in pod["spec"]["containers"]
                for port in c["ports"]
            }
            assert {port["port"] for port in rule.get("ports", ())} <= names
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
    (check,) = re.findall(r"HEALTHCHECK .* CMD \\\n +(.*)", text)
    program = json.loads(check)
    assert program[:2] == ["python", "-c"]
    assert re.findall(r"http://127.0.0.1:(\d+)(\S+)'", program[2]) == [("8000", "/health/live")]
