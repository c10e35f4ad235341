"""Flags, the records that are made of them, and the command lines that records are written as."""

import re
import typing
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from mixtral_jax.errors import ConfigError
from serving.access.config import AccessConfig
from serving.cluster.rank import Rank
from serving.command_line import app_of, command, run
from serving.engine.config import EngineConfig
from serving.flags import (
    GATEWAY,
    SECRETS,
    SERVE,
    SERVICE,
    Flag,
    arguments,
    defaults,
    record,
    secrets,
)
from serving.gateway.config import GatewayConfig
from serving.launch.config import ServiceConfig

ROOT = Path(__file__).parents[2]
COMMANDS = {"serve": SERVE, "service": SERVICE, "gateway": GATEWAY}
# Recognisable, and as long as keys must be.
MADE = {
    "api_key": "a" * 16,
    "gateway_key": "b" * 16,
    "group_key": "c" * 16,
    "model": "tiny-random",
}


def read(flags: tuple[Flag, ...], argv: list[str]) -> dict[str, Any]:
    """Parses a command line as the command with these flags does."""
    values: list[dict[str, Any]] = []
    assert run(app_of(command(values.append, flags)), argv) == 0
    return {**values[0], **MADE, "model": values[0].get("model")}


@pytest.mark.parametrize("flags", COMMANDS.values(), ids=COMMANDS)
def test_a_flag_stands_once_in_a_command(flags: tuple[Flag, ...]) -> None:
    names = [flag.name for flag in flags]
    assert len(names) == len(set(names)) > 25
    for flag in flags:
        assert flag.help.endswith((".", "2048.")) and flag.help[0].isupper(), flag.name


@pytest.mark.parametrize(
    ("kind", "flags", "others"),
    [
        (EngineConfig, SERVICE, set()),
        (ServiceConfig, SERVICE, set()),
        (AccessConfig, SERVICE, {"admits_gateway"}),
        (Rank, SERVICE, set()),
        (GatewayConfig, GATEWAY, set()),
    ],
)
def test_every_field_of_a_record_is_a_flag_or_a_secret(
    kind: Any, flags: tuple[Flag, ...], others: set[str]
) -> None:
    known = {flag.name: flag.type for flag in flags}
    hints = get_type_hints(kind)
    for field in fields(kind):
        if field.name in others or field.name in SECRETS:
            continue
        typed = {known[field.name], *typing.get_args(known[field.name])}
        if tuple[str, ...] == hints[field.name]:
            assert known[field.name] == list[str]
        else:
            names = {str, int, float, bool, Path} & {
                hints[field.name],
                *typing.get_args(hints[field.name]),
            }
            literal = str in names and any(isinstance(item, str) for item in _flat(typed))
            assert literal or names <= typed, field.name


def _flat(types: set[Any]) -> list[Any]:
    return [item for kind in types for item in (kind, *typing.get_args(kind))]


def test_a_record_survives_the_command_line_of_a_child() -> None:
    argv = ["--model=here", "--mesh=data=1,expert=2", "--no-prefix-reuse", "--deterministic"]
    argv += ["--kv-dtype=int8", "--kv-memory=7", "--entra-tenant=x", "--entra-tenant=y"]
    argv += ["--keys=/k", "--metrics-port=0", "--log-format=json", "--drain-seconds=1.5"]
    given = read(SERVICE, argv)
    made: list[Callable[[dict[str, Any]], Any]] = [
        lambda values: record(EngineConfig, values),
        lambda values: record(ServiceConfig, values),
        lambda values: record(AccessConfig, values, admits_gateway=True),
    ]
    records = [make(given) for make in made]
    again = read(SERVICE, arguments(*records))
    assert [make(again) for make in made] == records
    engine = asdict(records[0])
    assert (engine["prefix_reuse"], engine["kv_memory"], engine["dtype"]) == (False, 7, None)
    assert records[2].entra_tenant == ("x", "y")


def test_adapters_are_folders_by_their_names(tmp_path: Path) -> None:
    def made(*argv: str) -> EngineConfig:
        return record(EngineConfig, read(SERVICE, ["--model=m", *argv]))

    assert (made().adapters, made().num_adapters) == ({}, 0)
    config = made("--adapter=a=/x", "--adapter=b/c=y=z", f"--adapters-folder={tmp_path}")
    assert config.adapters == {"a": Path("/x"), "b/c": Path("y=z")}
    assert (config.num_adapters, config.max_adapter_rank) == (8, 16)
    assert made("--adapter=a=/x", "--max-adapters=2").num_adapters == 2
    assert made(*(f"--adapter=a{i}=/x" for i in range(9))).num_adapters == 9
    assert record(EngineConfig, read(SERVICE, arguments(config))) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adapter=a"], "NAME=FOLDER"),
        (["--adapter==x"], "NAME=FOLDER"),
        (["--adapter=a=x", "--adapter=a=y"], "twice"),
        (["--adapter=a=x", "--adapter=b=y", "--max-adapters=1"], "at least as many"),
        (["--max-adapters=2"], "--adapter or --adapters-folder"),
        (["--adapters-folder=/nowhere"], "no folder"),
    ],
)
def test_adapters_that_cannot_be_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        record(EngineConfig, read(SERVICE, ["--model=m", *argv]))


def test_a_gateways_record_survives_too_and_no_secret_is_written() -> None:
    given = read(GATEWAY, ["--target=a:1", "--target=b:2", "--cors-origin=*"]) | {"target": ["a:1"]}
    config = record(GatewayConfig, given)
    written = arguments(config)
    assert record(GatewayConfig, read(GATEWAY, written)) == config
    assert not [word for word in written if "=bb" in word or "key" in word]
    assert MADE["gateway_key"] not in repr(config)


def test_a_rank_is_made_of_flags_and_written_as_flags() -> None:
    argv = ["--model=m", "--coordinator=127.0.0.1:9", "--num-processes=2", "--process-id=1"]
    rank = record(Rank.of_flags, read(SERVICE, argv))
    assert rank is not None
    assert arguments(rank) == [*argv[1:], "--coordinator-timeout=300.0"]
    assert record(Rank.of_flags, read(SERVICE, ["--model=m", *arguments(rank)])) == rank
    assert arguments(record(Rank.of_flags, defaults(SERVICE, **MADE))) == []


def test_secrets_stand_in_the_environment_and_empty_ones_are_none() -> None:
    assert secrets({"MIXTRAL_JAX_API_KEY": "k", "MIXTRAL_JAX_SERVICE_KEY": ""}) == {
        "api_key": "k",
        "gateway_key": None,
        "group_key": None,
    }


def test_messages_name_flags_and_variables_that_exist() -> None:
    spellings = {flag.spelling for flags in COMMANDS.values() for flag in flags}
    spellings |= {"--help", "--file", "--old", "--version", "--debug", "--grpc-port", "--plot"}
    variables = {*SECRETS.values(), "MIXTRAL_JAX_PARENT", "MIXTRAL_JAX_READY_FD"}
    variables |= {"MIXTRAL_JAX_LISTENER_FD", "MIXTRAL_JAX_LEDGER"}
    for room in ("access", "cluster", "engine", "launch", "gateway", "observe", "accounting"):
        for path in (ROOT / "serving" / room).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            unknown = set(re.findall(r"(?<![\w`-])--[a-z][a-z-]+\w", text)) - spellings
            assert not {word for word in unknown if not word.endswith("-")}, path
            assert set(re.findall(r"MIXTRAL_JAX_\w+", text)) <= variables, path
