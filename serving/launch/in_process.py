"""A service in threads of a process that has loaded the model already, such as a notebook's.

A process that has a TPU or GPU shares it with no server beside it; with this one it does.
"""

import asyncio
import secrets
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

from mixtral_jax.model.transformer import Transformer
from mixtral_jax.tokenization.tokenizer import Tokenizer
from serving.access.config import AccessConfig
from serving.access.credentials import Access
from serving.client import Client
from serving.engine.adapters import AdapterLoader
from serving.engine.build import engine_of, prepare_loaded, proposer_of
from serving.engine.config import EngineConfig
from serving.engine.metrics import Metrics
from serving.engine.worker import EngineWorker
from serving.flags import SERVICE, defaults, record
from serving.proto import inference_pb2 as pb
from serving.service.models.served_models import ServedModels
from serving.service.service import InferenceService, create_server

_HOST = "127.0.0.1"


class InProcessService:
    """Serves a loaded model, and adapters beside it, over gRPC on this machine until `close`.

        service = InProcessService(model, tokenizer, adapters={"mine": "runs/mine/adapter"})
        print(service.client.complete("Once upon a time", model="mine", max_tokens=20).text)
        service.close()

    Requests of the model and of all adapters share the steps of one engine. Other clients reach it
    at `target` with the key `key`, which is made up. Answers cannot be held to a form here.

    Args:
        model: must not be changed while it is served.
        tokenizer: that of the model.
        name: under which the model itself is asked for.
        adapters: folders of LoRA adapters by the names under which they are asked for.
        max_sequences: answers that are computed at the same time; more of them wait.
        kv_memory: MiB of keys and values on each device.

    Raises ConfigError for numbers below 1, and AdapterError for an adapter that is broken, does not
    fit the model, or has the model's name.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        name: str = "base",
        adapters: Mapping[str, Path | str] | None = None,
        max_sequences: int = 8,
        kv_memory: int = 256,
    ) -> None:
        self.name = name
        self.key = secrets.token_hex(16)
        adapters = adapters or {}
        given = defaults(
            SERVICE,
            model=name,
            adapter=[f"{adapter}={folder}" for adapter, folder in adapters.items()],
            max_sequences=max_sequences,
            kv_memory=kv_memory,
            host=_HOST,
            api_key=self.key,
            gateway_key=None,
        )
        access = record(AccessConfig, given, admits_gateway=False).access()
        config = record(EngineConfig, given)
        prepared = prepare_loaded(config, model, say=lambda line: None)
        engine = engine_of(
            prepared.model,
            prepared.limits,
            prepared.steps,
            max_decode_slowdown=config.max_decode_slowdown,
            proposer=proposer_of(config),
        )
        self._worker = EngineWorker(engine, Metrics(name))
        loader = AdapterLoader(engine, self._worker.call)
        models = ServedModels(name, (), loader.digests)
        info = pb.ModelInfo(
            name=name,
            type="chat-completions",
            max_context=prepared.limits.max_context,
            vocab_size=model.config.vocab_size,
        )
        self._ready: Future[str] = Future()
        self._end = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        service = InferenceService(self._worker, tokenizer, info, models=models)
        serving = self._serve(service, access)
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(serving,), name="service", daemon=True
        )
        self._worker.start()
        try:
            for adapter, folder in config.adapters.items():
                models.check_name(adapter)
                loader.read(adapter, folder)()
        except BaseException:
            self._worker.stop()
            serving.close()
            raise
        self._thread.start()
        self.target = self._ready.result()
        self.client = Client(self.target, key=self.key)

    def close(self) -> None:
        """Ends it; answers that are under way end with Unavailable."""
        self.client.close()
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        self._loop.close()
        self._worker.stop()

    def __enter__(self) -> "InProcessService":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def _serve(self, service: InferenceService, access: Access) -> None:
        try:
            server, port, _ = await create_server(f"{_HOST}:0", service, access)
        except BaseException as error:
            self._ready.set_exception(error)
            raise
        self._ready.set_result(f"{_HOST}:{port}")
        await self._end.wait()
        await server.stop(grace=0.0)
