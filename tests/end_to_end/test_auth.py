"""Keys and tokens over real sockets, from the gateway's headers to the service's metadata."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from mixtral_jax.cli.main import app
from serving.access.credentials import Access
from serving.access.entra import TokenVerifier
from serving.access.key_file import KeyFile
from serving.access.keyring import Keyring
from serving.accounting.accounts import Accounts
from serving.accounting.admission import Admission
from serving.accounting.caller_fields import CallerFields
from serving.errors import ERROR_METADATA
from serving.gateway.__main__ import main
from serving.gateway.http.metrics import GatewayMetrics
from serving.launch.supervisor import Addresses, environment_from
from serving.proto import inference_pb2, inference_pb2_grpc
from serving.service.direct_calls import DirectCalls
from serving.service.interceptor import AccessInterceptor
from tests.support.fakes import KEY, Stack, running_stack
from tests.support.identity import TENANT, Identity, running_identity

PATIENCE = 60.0
CHAT = {"messages": [{"role": "user", "content": "one two"}]}
VARIABLES = ("MIXTRAL_JAX_API_KEY", "MIXTRAL_JAX_SERVICE_KEY")


def status(stack: Stack, **headers: str) -> int:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.get(f"{stack.url}/info", headers=sent, timeout=PATIENCE).status_code


def test_keys_come_and_go_while_the_gateway_runs(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    alice = file.add("alice")
    with running_stack(access=Access(Keyring({"default": "fixed"}, file))) as stack:
        assert status(stack, authorization=f"Bearer {alice}") == 200
        assert status(stack, api_key="fixed") == 200
        assert status(stack, api_key=KEY) == 401  # which is the service's, not a client's
        bob = file.add("bob")
        file.remove("alice")
        assert wait_for(200, stack, bob) and wait_for(401, stack, alice)
        answer = httpx.post(
            f"{stack.url}/chat/completions", json=CHAT, headers={"api-key": bob}, timeout=PATIENCE
        )
        assert answer.json()["choices"][0]["message"]["content"] == "one two"


def test_an_operator_needs_no_key_of_the_environment(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    alice, root = file.add("alice"), file.add("root", role="operator")
    with (
        running_stack(access=Access(Keyring({}, file))) as stack,
        httpx.Client(base_url=stack.url, timeout=PATIENCE) as client,
    ):
        chat = client.post("/chat/completions", json=CHAT, headers={"api-key": alice})
        assert chat.status_code == 200
        refused = client.get("/usage?all=true", headers={"api-key": alice})
        assert refused.status_code == 403 and "operators" in refused.json()["error"]["message"]
        everybody = client.get("/usage?all=true", headers={"api-key": root})
        assert [row["caller"] for row in everybody.json()["data"]] == ["alice"]


def test_an_expired_key_is_401_and_names_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key = file.add("alice", role="operator", lifetime=timedelta(0))
    caplog.set_level("INFO", "serving.gateway.http.access_log")
    with running_stack(access=Access(Keyring({"default": KEY}, file))) as stack:
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.get(f"{stack.url}/info", headers=headers, timeout=PATIENCE)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert "this key has expired" in answer.text and "alice" not in answer.text
        # The other header may still open, as where a client sends both.
        assert status(stack, authorization=f"Bearer {key}", api_key=KEY) == 200
        wrong = httpx.get(f"{stack.url}/info", headers={"api-key": key[:-1]}, timeout=PATIENCE)
        assert wrong.status_code == 401 and "expired" not in wrong.text

        def reasons() -> list[str]:
            # Others log too: gRPC where a call ends with the server.
            lines = [record.__dict__.get("mixtral_fields") for record in [*caplog.records]]
            return [line.get("reason", "") for line in lines if line is not None]

        deadline = time.monotonic() + PATIENCE
        while len(reasons()) < 3:  # a line is written after its answer was sent
            assert time.monotonic() < deadline
            time.sleep(0.01)
        said = reasons()
    assert "this key has expired" in said[0] and "send the key" in said[2]
    assert key not in caplog.text


def test_a_file_of_keys_that_cannot_be_read_shows_in_the_metrics(tmp_path: Path) -> None:
    file, metrics = KeyFile(tmp_path / "keys.json"), GatewayMetrics()
    alice, bob = file.add("alice"), file.add("bob")

    def failed() -> float | None:
        return metrics.registry.get_sample_value("mixtral_keys_reload_failed")

    access = Access(Keyring({}, file))
    with running_stack(access=access, parts={"metrics": metrics}) as stack:
        assert failed() == 0
        file.path.rename(tmp_path / "away")
        file.path.mkdir()  # which can be opened by nobody
        assert until(lambda: status(stack, api_key=alice) == 200 and failed() == 1)
        file.path.rmdir()
        (tmp_path / "away").rename(file.path)
        file.remove("alice")
        assert wait_for(401, stack, alice) and wait_for(200, stack, bob)
        assert failed() == 0


def until(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds within seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def wait_for(wanted: int, stack: Stack, key: str) -> bool:
    """Whether a key is answered so within seconds."""
    return until(lambda: status(stack, api_key=key) == wanted)


@pytest.fixture(scope="module")
def identity() -> Iterator[Identity]:
    with running_identity() as identity:
        yield identity


def token_of(identity: Identity, resource: str = "https://ml.azure.com") -> str:
    answer = httpx.get(
        f"{identity.url}/msi/token",
        params={"resource": resource},
        headers={"x-identity-header": "not-a-secret"},
        timeout=PATIENCE,
    )
    return str(answer.json()["access_token"])


def test_tokens_at_the_gateway(identity: Identity) -> None:
    keyring = Keyring({"default": KEY})
    tokens = TokenVerifier([TENANT], allowed=[identity.object_id], authority=identity.url)
    token = token_of(identity)
    with running_stack(access=Access(keyring, tokens)) as stack:
        assert status(stack, authorization=f"Bearer {token}") == 200
        assert status(stack, api_key=KEY) == 200
        assert status(stack, authorization=f"Bearer {token[:-4]}") == 401
        assert status(stack, authorization=f"Bearer {token_of(identity, 'https://other')}") == 401
        huge = httpx.get(
            f"{stack.url}/info",
            headers={"authorization": f"Bearer {'a.' * 2}{'x' * 20_000}"},
            timeout=PATIENCE,
        )
        assert huge.status_code == 401
        assert huge.headers["www-authenticate"] == "Bearer"
    tokens = TokenVerifier([TENANT], authority=identity.url)
    with running_stack(access=Access(keyring, tokens)) as stack:
        refused = httpx.get(
            f"{stack.url}/info", headers={"authorization": f"Bearer {token}"}, timeout=PATIENCE
        )
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == refused.headers["x-ms-error-code"] == "Forbidden"
        assert "www-authenticate" not in refused.headers and "retry-after" not in refused.headers


def test_an_authority_that_is_down_is_not_the_clients_fault(identity: Identity) -> None:
    tokens = TokenVerifier([TENANT], allowed=["*"], authority="http://127.0.0.1:1")
    with running_stack(access=Access(Keyring({"default": KEY}), tokens)) as stack:
        answer = httpx.get(
            f"{stack.url}/info",
            headers={"authorization": f"Bearer {token_of(identity)}"},
            timeout=PATIENCE,
        )
        assert answer.status_code == 503
        assert answer.headers["retry-after"].isdecimal()
        assert status(stack, api_key=KEY) == 200


def test_open_access() -> None:
    with running_stack(access=Access(Keyring({}), is_open=True)) as stack:
        assert status(stack) == status(stack, api_key="whatever") == 200


class Inference(inference_pb2_grpc.InferenceServicer):
    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: object
    ) -> inference_pb2.ModelInfo:
        return inference_pb2.ModelInfo(name="toy")

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        yield inference_pb2.GenerateChunk(text="hello")

    async def Drain(
        self, request: inference_pb2.DrainRequest, context: object
    ) -> inference_pb2.DrainReply:
        return inference_pb2.DrainReply()


@asynccontextmanager
async def serving(access: Access) -> AsyncIterator[grpc.aio.Channel]:
    """A service of which Drain is for operators."""
    drain = "/mixtral.v1.Inference/Drain"
    calls = DirectCalls(Admission(Accounts()), CallerFields(None), 64)
    server = grpc.aio.server(interceptors=[AccessInterceptor(access, {drain}, direct_calls=calls)])
    inference_pb2_grpc.add_InferenceServicer_to_server(Inference(), server)
    health_pb2_grpc.add_HealthServicer_to_server(
        health.aio.HealthServicer(),  # type: ignore[attr-defined]
        server,
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def told(channel: grpc.aio.Channel, method: str, headers: Mapping[str, str]) -> str:
    """ "OK", or how the call of that method is refused."""
    stub = inference_pb2_grpc.InferenceStub(channel)
    metadata = tuple(headers.items())
    try:
        if method == "Generate":
            request = inference_pb2.GenerateRequest()
            async for _ in stub.Generate(request, metadata=metadata):
                pass
        elif method == "Drain":
            await stub.Drain(inference_pb2.DrainRequest(), metadata=metadata)
        else:
            await stub.GetModelInfo(inference_pb2.GetModelInfoRequest(), metadata=metadata)
    except grpc.aio.AioRpcError as error:
        trailing = dict(error.trailing_metadata() or ())
        return f"{error.code().name} {trailing[ERROR_METADATA]}"
    return "OK"


def test_the_service_knows_its_callers(tmp_path: Path, identity: Identity) -> None:
    file = KeyFile(tmp_path / "keys.json")
    alice, root = file.add("alice"), file.add("root", role="operator")
    expired = file.add("expired", role="operator", lifetime=timedelta(0))
    keyring = Keyring({"default": "first", "gateway": "second"}, file)
    tokens = TokenVerifier([TENANT], allowed=[identity.object_id], authority=identity.url)
    nobody = TokenVerifier([TENANT], authority=identity.url)
    token = {"authorization": f"Bearer {token_of(identity)}"}
    no, forbidden = "UNAUTHENTICATED Unauthenticated", "PERMISSION_DENIED Forbidden"

    async def run() -> None:
        async with serving(Access(keyring, tokens)) as channel:
            for headers, others, drain in (
                ({"authorization": "Bearer first"}, "OK", "OK"),
                ({"authorization": "first"}, "OK", "OK"),
                ({"api-key": "second"}, "OK", "OK"),
                ({"api-key": alice}, "OK", forbidden),
                ({"api-key": root}, "OK", "OK"),
                ({"api-key": expired}, no, no),
                (token, "OK", forbidden),
                ({"api-key": "wrong"}, no, no),
                ({}, no, no),
            ):
                assert await told(channel, "GetModelInfo", headers) == others
                assert await told(channel, "Generate", headers) == others
                assert await told(channel, "Drain", headers) == drain
            checked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert (await checked).status == health_pb2.HealthCheckResponse.SERVING
        async with serving(Access(keyring, nobody)) as channel:
            assert await told(channel, "Generate", token) == forbidden
        async with serving(Access(Keyring({"gateway": "second"}), is_open=True)) as channel:
            assert await told(channel, "Generate", {}) == "OK"
            assert await told(channel, "Drain", {}) == forbidden
            assert await told(channel, "Drain", {"api-key": "second"}) == "OK"

    asyncio.run(run())


def test_serve_makes_up_the_keys_that_are_missing() -> None:
    client, gateway = VARIABLES
    made = environment_from({"HOME": "/"}, makes_key=True)
    assert made["HOME"] == "/" and made.keys() == {"HOME", *VARIABLES}
    assert len(made[client]) == len(made[gateway]) == 32 and made[client] != made[gateway]
    assert environment_from({}, makes_key=False).keys() == {gateway}
    own = {client: "mine", gateway: "ours"}
    assert environment_from(own, makes_key=True) == own


def test_with_https_grpc_stays_on_this_machine() -> None:
    plain = Addresses(host="0.0.0.0", port=1, grpc_port=2)
    assert (plain.url, plain.target) == ("http://0.0.0.0:1", "0.0.0.0:2")
    secured = Addresses(host="0.0.0.0", port=1, grpc_port=2, tls=True)
    assert (secured.url, secured.target) == ("https://0.0.0.0:1", "127.0.0.1:2")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-auth", "--host", "0.0.0.0"], "--no-auth would let everybody in"),
        (["--tls-cert", "/nowhere", "--tls-key", "/nowhere"], "--tls-cert /nowhere: No such file"),
        (["--keys", "/nowhere"], "--keys /nowhere: no such file"),
        (["--entra-tenant", "contoso"], "'contoso' is no tenant"),
    ],
)
def test_serve_tells_what_is_wrong_before_it_starts_anything(flags: list[str], words: str) -> None:
    ended = CliRunner().invoke(app, ["serve", "--model", "tiny-random", *flags])
    assert isinstance(ended.exception, ValueError)
    assert re.match(words, str(ended.exception))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-auth", "--host", "0.0.0.0"], "--no-auth would let everybody in .* --host 127"),
        (["--no-auth", "--host", "::"], "--no-auth would let everybody in"),
        (["--no-auth", "--host", "localhost.example"], "--no-auth would let everybody in"),
        (["--no-auth", "--keys", "x"], "leave out --keys"),
        (["--no-auth", "--entra-tenant", TENANT], "leave out --keys and --entra-tenant"),
        (["--keys", "/nowhere"], "--keys /nowhere: no such file; .*keys add NAME --file /nowhere"),
        (["--keys", "/"], "--keys /: Is a directory"),
        (["--entra-tenant", "contoso"], "'contoso' is no tenant"),
        (["--entra-allow", "*"], "need --entra-tenant"),
        (
            ["--entra-tenant", TENANT, "--entra-authority", "http://login.example"],
            "must begin with https",
        ),
        (["--entra-role", "Chat.Ask"], "need --entra-tenant"),
        ([], "MIXTRAL_JAX_API_KEY is not set"),
        (["--entra-tenant", TENANT], "MIXTRAL_JAX_SERVICE_KEY is not set"),
    ],
)
def test_flags_that_contradict_or_open_too_much(
    flags: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert main(["--port", "0", *flags]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("mixtral-jax: ")
    assert re.search(words, said), said
