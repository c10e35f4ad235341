"""Adapters of the start and of a folder, before a host that only writes down."""

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from mixtral_jax.errors import AdapterError
from serving.engine.config import EngineConfig
from serving.flags import SERVICE, defaults, record
from serving.launch.adapters import followed_adapters
from serving.service.models.adapter_metrics import AdapterMetrics
from serving.service.models.served_models import ServedModels
from tests.serving.service.models.test_adapter_folder import Host, write


@pytest.fixture(autouse=True)
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.service.models.adapter_folder.LOOK_SECONDS", 0.01)


def follow(host: Host, lines: list[str], **given: Any) -> Any:
    config = record(EngineConfig, defaults(SERVICE, model="m", **given))
    metrics = AdapterMetrics(CollectorRegistry(), "toy", host.digests)
    return followed_adapters(config, ServedModels("toy", ["azureai"]), host, metrics, lines.append)


def test_those_of_the_start_and_of_the_folder_are_loaded(tmp_path: Path) -> None:
    write(tmp_path, "one", "1")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, "two", "2")
    write(folder, "one", "3")  # the name of the one of the start, which stays
    host, lines = Host(), list[str]()
    with follow(host, lines, adapter=[f"one={tmp_path / 'one'}"], adapters_folder=folder):
        assert host.loaded == {"one": "1", "two": "2"}
        assert lines == [f"adapter one from {tmp_path / 'one'}", f"adapters of {folder}: 1"]


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("one", "broken", "is damaged"),
        ("toy", "1", "for the model is"),
        ("azureai", "1", "--model-alias"),
        ("a b", "1", "cannot be called 'a b'"),
    ],
)
def test_a_wrong_one_at_the_start_is_an_error(
    tmp_path: Path, name: str, weights: str, message: str
) -> None:
    write(tmp_path, "x", weights)
    host = Host()
    with (
        pytest.raises(AdapterError, match=message),
        follow(host, [], adapter=[f"{name}={tmp_path / 'x'}"]),
    ):
        pass
    assert host.loaded == {}
