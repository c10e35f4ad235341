"""A text process of a service: gRPC, access, reading of requests, grammars and text; no engine.

The engine's process starts it with its own command line, and with a pipe (serving/texts/). It ends
when that process tells it to, or has gone.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtral_jax.errors import UserError
from mixtral_jax.structure.compiler import Compiler
from mixtral_jax.tokenization import tokenizer
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.tokenization.toy_bytes import ByteTokenizer
from serving.access.config import AccessConfig
from serving.access.credentials import Access
from serving.access.renewal import RenewedServerTls
from serving.accounting.admission import Admission
from serving.accounting.caller_fields import CallerFields
from serving.accounting.config import AccountingConfig
from serving.accounting.ledger_client import SharedAccounts
from serving.accounting.ledger_server import LEDGER_VARIABLE
from serving.channel import join_address
from serving.command_line import USER_ERRORS, Errors, app_of, command, run
from serving.engine.config import EngineConfig
from serving.errors import ServingError, SetupError
from serving.flags import SERVICE, record
from serving.launch.config import ServiceConfig
from serving.observe.logs import set_up
from serving.observe.tracing import Traces
from serving.open_files import raise_open_files
from serving.parent import PIPE_VARIABLE, beat, end_process, end_with_parent
from serving.proto import inference_pb2, texts_pb2
from serving.service.answer.pace import Pace
from serving.service.call_record import Calls
from serving.service.models.served_models import ServedModels
from serving.service.service import InferenceService, create_server, set_serving
from serving.texts.remote import RemoteCounts, RemoteEngine

_ERRORS: Errors = (UserError, *USER_ERRORS)
_LOOPBACK = "127.0.0.1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until the engine's process ends it; returns the exit status."""
    return run(app_of(command(_serve, SERVICE)), arguments, _ERRORS, f"python -m {__spec__.name}")


def _serve(given: dict[str, Any]) -> None:
    """Serve a part of the calls of a service, whose engine's process starts this one."""
    pipe = os.environ.pop(PIPE_VARIABLE, None)
    if pipe is None or LEDGER_VARIABLE not in os.environ:
        raise SetupError("this is a part of `python -m serving --service-processes N`; start that")
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # they are for the engine's process
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    raise_open_files()
    service = record(ServiceConfig, given)
    set_up("serving", service.log_format)
    access = record(AccessConfig, given, admits_gateway=True)
    accounting = record(AccountingConfig, given)
    # Those of the engine's process, which settles what is open here if this process dies.
    accounts = SharedAccounts.of(accounting, os.environ[LEDGER_VARIABLE])
    traces = Traces.exported(service.otlp_endpoint, "service")
    process = _TextProcess(
        service,
        access,
        accounts,
        Admission(accounts, accounting.assumed_max_tokens, accounting.cached_token_charge),
        CallerFields(access.gateway_key, share_prefixes=accounting.share_prefixes),
        traces,
        reads_predictions=record(EngineConfig, given).reads_predictions,
    )
    try:
        was_ended = asyncio.run(process.run(socket.socket(fileno=int(pipe))))
    finally:
        traces.close()
        accounts.close()
    if not was_ended:
        end_process(1)  # threads that compile or tokenize would be waited for


class _TextProcess:
    """Serves calls by an engine behind a pipe."""

    def __init__(
        self,
        service: ServiceConfig,
        access: AccessConfig,
        accounts: SharedAccounts,
        admission: Admission,
        fields: CallerFields,
        traces: Traces,
        *,
        reads_predictions: bool,
    ) -> None:
        self._reads_predictions = reads_predictions
        self._service, self._access = service, access
        self._accounts = accounts
        self._admission, self._fields, self._traces = admission, fields, traces

    async def run(self, pipe: socket.socket) -> bool:
        """Serves until the engine's process has ended it; returns False if that was lost."""
        loop = asyncio.get_running_loop()
        engine = RemoteEngine()
        await loop.create_unix_connection(lambda: engine, sock=pipe)
        try:
            welcome = await engine.welcome
        except ServingError:
            return False
        words = await asyncio.to_thread(_tokenizer, welcome.tokenizer)
        with Compiler(words, welcome.width, processes=1) as compiler:
            return await self._serve(engine, welcome, words, compiler)

    async def _serve(
        self,
        engine: RemoteEngine,
        welcome: texts_pb2.Welcome,
        words: Tokenizer,
        compiler: Compiler,
    ) -> bool:
        info = inference_pb2.ModelInfo.FromString(welcome.info)
        counts = RemoteCounts(engine)
        inference = InferenceService(
            engine,
            words,
            info,
            Calls(counts, self._traces, counts),
            self._service.max_bytes_per_token,
            compiler,
            ServedModels(info.name, self._service.model_alias, engine.digests),
            engine.prepare_scores,
            Pace(self._service.stream_interval),
            reads_predictions=self._reads_predictions,
        )
        access, tls = self._access.access(), self._access.renewed_tls()
        try:
            server, _, checks = await create_server(
                join_address(self._access.host, welcome.port),
                inference,
                access,
                tls,
                self._admission,
                self._fields,
                welcome.max_calls,
                shares_port=True,
                own_address=join_address(_LOOPBACK, welcome.own_port) if welcome.own_port else None,
            )
        except OSError as error:
            raise SetupError(str(error)) from None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):  # the whole service ends
            loop.add_signal_handler(number, engine.ask, texts_pb2.Ask(drain=texts_pb2.Nothing()))
        ending: asyncio.Future[Any] = engine.ending
        telling = asyncio.create_task(_tell(engine, access, tls, self._accounts))
        leaving: asyncio.Future[Any] = asyncio.ensure_future(engine.leaving.wait())
        await asyncio.wait([leaving, ending, telling], return_when=asyncio.FIRST_COMPLETED)
        # Health comes first, so that load balancers send new requests elsewhere.
        await set_serving(checks, False)
        await asyncio.wait([ending, telling], return_when=asyncio.FIRST_COMPLETED)
        engine.drain()
        was_lost = telling.done() or engine.ending.cancelled()
        deadline = time.monotonic() + (0.0 if was_lost else engine.ending.result())
        while engine.num_under_way and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        await server.stop(0.2 if was_lost else 1.0)
        telling.cancel()
        leaving.cancel()
        engine.close()
        return not was_lost


async def _tell(
    engine: RemoteEngine, access: Access, tls: RenewedServerTls | None, accounts: SharedAccounts
) -> None:
    """Tells the engine's process how this one is, and that it moves.

    Returns when the accounts are lost: this process would refuse everybody, and is started again.
    """
    latest = None
    while not accounts.was_lost:
        state = texts_pb2.State(
            is_serving=True,
            keys_failed=access.reload_failed,
            certificate_failed=tls is not None and tls.reload_failed,
        )
        if state != latest:
            engine.tell(state)
            latest = state
        beat()
        await asyncio.sleep(1.0)


def _tokenizer(folder: str) -> Tokenizer:
    return tokenizer.load(Path(folder)) if folder else ByteTokenizer()


if __name__ == "__main__":
    sys.exit(main())
