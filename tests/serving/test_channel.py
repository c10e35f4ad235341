"""How several targets are written as one."""

import json

import pytest

from serving.channel import INFERENCE, options_for, target_of
from serving.proto import inference_pb2 as pb


@pytest.mark.parametrize(
    ("targets", "one"),
    [
        (["127.0.0.1:50051"], "127.0.0.1:50051"),
        (["models:50051"], "models:50051"),
        (["dns:///models:50051"], "dns:///models:50051"),
        (["10.0.0.1:1", "10.0.0.2:2"], "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (["10.0.0.1:1, 10.0.0.2:2", "10.0.0.3:3"], "ipv4:10.0.0.1:1,10.0.0.2:2,10.0.0.3:3"),
        (["ipv4:10.0.0.1:1,10.0.0.2:2"], "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (["[::1]:1", "[::2]:2"], "ipv6:[::1]:1,[::2]:2"),
    ],
)
def test_targets(targets: list[str], one: str) -> None:
    assert target_of(targets) == one


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        ([], "is empty"),
        (["a:1,"], "is empty"),
        (["a:1", "b:1"], "'a:1' is one of several targets .* dns:///models:50051"),
        (["10.0.0.1:1", "10.0.0.2"], "'10.0.0.2' is one of several"),
        (["::1:1", "[::2]:2"], "'::1:1' is one of several"),
        (["10.0.0.1:1", "[::2]:2"], "must all be IPv4 or all IPv6"),
        (["dns:///models:1", "10.0.0.1:1"], "'dns:///models:1' is one of several"),
    ],
)
def test_targets_that_cannot_be_used(targets: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        target_of(targets)


def test_calls_are_repeated_only_where_there_may_be_several() -> None:
    def config(target: str) -> dict[str, object]:
        return dict(json.loads(str(dict(options_for(target))["grpc.service_config"])))

    assert "methodConfig" not in config("127.0.0.1:50051")
    assert "methodConfig" in config("dns:///models:50051")
    assert "methodConfig" in config("ipv4:10.0.0.1:1,10.0.0.2:2")


def test_drain_is_never_repeated_and_overload_not_without_end() -> None:
    options = dict(options_for("ipv4:10.0.0.1:1,10.0.0.2:2"))
    config = json.loads(str(options["grpc.service_config"]))
    (policy,) = config["methodConfig"]
    named = {(name["service"], name["method"]) for name in policy["name"]}
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["Inference"].methods}
    assert named == {(INFERENCE, method) for method in methods - {"Drain"}}
    throttling = config["retryThrottling"]
    assert throttling["maxTokens"] <= 1000 and 0 < throttling["tokenRatio"] < 1


def test_the_watched_service_is_that_of_the_contract() -> None:
    assert pb.DESCRIPTOR.services_by_name["Inference"].full_name == INFERENCE
