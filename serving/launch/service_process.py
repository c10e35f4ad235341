"""The process of `python -m serving`: one engine behind gRPC, until SIGTERM or SIGINT."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, NoReturn

from mixtral_jax.checkpoint.pretrained import Pretrained, open_pretrained
from mixtral_jax.compilation import CompilationCount, keep_programs
from mixtral_jax.errors import ConfigError, UserError
from mixtral_jax.structure.compiler import Compiler
from serving.access.config import AccessConfig
from serving.accounting.accounts import Accounts
from serving.accounting.admission import Admission
from serving.accounting.caller_fields import CallerFields
from serving.accounting.config import AccountingConfig
from serving.accounting.ledger_server import LedgerServer
from serving.channel import join_address
from serving.cluster.follower import follow
from serving.cluster.leader import Leader, connect
from serving.cluster.rank import Rank
from serving.command_line import USER_ERRORS, Errors, app_of, command, exit_status, run
from serving.engine.adapters import AdapterLoader
from serving.engine.build import engine_of, facts, prepare, proposer_of
from serving.engine.cache_memory import DeviceMemory
from serving.engine.config import EngineConfig
from serving.engine.expert_load import ExpertLoad
from serving.engine.metrics import Metrics
from serving.engine.watchdog import until_stuck
from serving.engine.worker import EngineWorker
from serving.errors import ServingError, Unavailable
from serving.flags import SERVICE, arguments, record
from serving.launch.adapters import followed_adapters
from serving.launch.config import ServiceConfig
from serving.launch.event_loop import run_loop
from serving.launch.front import Front, LocalFront
from serving.launch.gpu_memory import take_gpu_memory
from serving.launch.late_programs import THREAD, LatePrograms
from serving.launch.profiling import JaxTracer, Profiling
from serving.launch.sampling_defaults import chosen_defaults
from serving.launch.text_processes import TextProcesses
from serving.observe.key_reloads import report_failed_certificate, report_failed_reload
from serving.observe.logs import set_up
from serving.observe.metrics_port import serve_metrics
from serving.observe.tracing import Traces
from serving.open_files import raise_open_files
from serving.parent import beat, end_process, end_with_parent
from serving.proto import inference_pb2 as pb
from serving.proto import texts_pb2
from serving.scheduling.step_plan import Limits
from serving.service.answer.pace import Pace
from serving.service.call_record import Calls
from serving.service.models.adapter_metrics import AdapterMetrics
from serving.service.models.served_models import ServedModels
from serving.service.service import InferenceService
from serving.texts.hub import Hub, Parts

_ERRORS: Errors = (UserError, *USER_ERRORS)
_STOOD_STILL = Unavailable("a step of the model stood still; the server starts again")
_PART_LOST = Unavailable("a part of the server was lost; it starts again")
# The event loop waits for the interpreter's lock for so long while the engine's thread plans its
# next step. Python's own 5 ms would stand before many a first token.
_SWITCH_SECONDS = 0.0005


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until a signal ends it; returns the exit status."""
    return run(app_of(command(_serve, SERVICE)), arguments, _ERRORS, "python -m serving")


def _serve(given: dict[str, Any]) -> None:
    """Serve one engine over gRPC until SIGTERM or SIGINT.

    Prints a line for each stage of the start, and `ready` when it answers.

    With --profile, SIGUSR1 starts a profile, and SIGUSR2 ends it before its time.

    Keys come from the environment: MIXTRAL_JAX_API_KEY holds one that clients present,
    MIXTRAL_JAX_SERVICE_KEY the gateway's. Where several processes run one model, process 0 serves
    and the others follow it until it ends; MIXTRAL_JAX_GROUP_KEY holds the key of the group.
    """
    engine, service = record(EngineConfig, given), record(ServiceConfig, given)
    accounting = record(AccountingConfig, given)
    rank = record(Rank.of_flags, given)
    if rank is not None and engine.draft_model is not None:
        raise ConfigError("--draft-model runs in one process; leave it or --coordinator out")
    end_with_parent()
    raise_open_files()
    take_gpu_memory(os.environ)
    set_up("serving", service.log_format)
    sys.setswitchinterval(_SWITCH_SECONDS)
    profiling = Profiling(service.profile, service.profile_seconds, JaxTracer())
    profiling.listen()
    if rank is None:
        access = record(AccessConfig, given, admits_gateway=True)
        try:
            _lead(engine, service, access, accounting, None, profiling)
        finally:
            profiling.close()
        return

    def work() -> None:
        if rank.is_leader:
            access = record(AccessConfig, given, admits_gateway=True)
            _lead(engine, service, access, accounting, rank, profiling)
        else:
            pretrained = open_pretrained(engine.model)
            follow(engine, rank, facts(engine, pretrained), pretrained, _say)

    # JAX would wait for the other processes at the exit, and they may be gone.
    status = exit_status(work, _ERRORS)
    profiling.close()
    end_process(status)


def _lead(
    engine: EngineConfig,
    service: ServiceConfig,
    access: AccessConfig,
    accounting: AccountingConfig,
    rank: Rank | None,
    profiling: Profiling,
) -> None:
    """Serves; with a rank, as the leader of its group."""
    if engine.expert_metrics and service.metrics_port is None:
        raise ConfigError("--expert-metrics is shown at --metrics-port; give that too")
    # Files that cannot be used are told before minutes of loading.
    door, tls = access.access(), access.renewed_tls()
    accounts = Accounts.of(accounting)
    pretrained = open_pretrained(engine.model)
    traces = Traces.exported(service.otlp_endpoint, "service")
    metrics = Metrics(pretrained.card.name)
    if service.metrics_port is not None:
        url = serve_metrics(metrics.registry, service.metrics_host, service.metrics_port)
        _say(f"metrics on {url}")
    leader = None if rank is None else _gathered(engine, rank, pretrained)
    # Its processes start beside the loading of the weights. Without a tokenizer nothing is served.
    # Text processes try grammars themselves.
    is_one = service.service_processes == 1
    compiler = Compiler(
        pretrained.tokenizer, pretrained.card.model.vocab_size, processes=2 if is_one else 0
    )
    built = _build(engine, service, pretrained, metrics, leader)
    worker, late = built.worker, built.late
    max_calls = engine.max_waiting + built.rows

    def front() -> Front:
        if not is_one:
            records = (engine, service, access, accounting)
            return _text_processes(records, pretrained, built, metrics, accounts, compiler)
        report_failed_reload(metrics.registry, lambda: door.reload_failed)
        if tls is not None:
            report_failed_certificate(metrics.registry, lambda: tls.reload_failed)
        inference = InferenceService(
            worker,
            pretrained.tokenizer,
            built.info,
            Calls(metrics, traces, built.counts),
            service.max_bytes_per_token,
            compiler,
            built.models,
            late.prepare_scores,
            Pace(service.stream_interval),
            reads_predictions=engine.reads_predictions,
        )
        admission = Admission(
            accounts, accounting.assumed_max_tokens, accounting.cached_token_charge
        )
        fields = CallerFields(access.gateway_key, share_prefixes=accounting.share_prefixes)
        address = join_address(access.host, service.port)
        return LocalFront(worker, inference, address, door, tls, admission, fields, max_calls)

    worker.start()
    try:
        server = _Server(worker, late, leader, service)
        with built.adapters:
            run_loop(server.run(front, access.host))
    finally:
        if leader is not None:
            if leader.loss is not None:
                _start_again(leader.loss)
            leader.on_loss = _start_again  # the thread would be waited for in vain
        is_idle = late.stop()
        has_ended = worker.stop(service.step_timeout)
        compiler.close()
        traces.close()
        accounts.close()
        if not has_ended:
            end_process(1)  # the exit would wait for what the thread holds
    if leader is not None and not worker.has_failed:
        leader.end(leader.leaving or f"{leader.name} was told to end")
    if not is_idle:
        profiling.close()
        if worker.has_failed:
            _say("the engine failed")
        end_process(int(worker.has_failed))  # the exit would wait for the compiler
    if worker.has_failed:
        sys.exit("the engine failed")


def _text_processes(
    records: tuple[EngineConfig, ServiceConfig, AccessConfig, AccountingConfig],
    pretrained: Pretrained,
    built: "_Built",
    metrics: Metrics,
    accounts: Accounts,
    compiler: Compiler,
) -> TextProcesses:
    """Returns the front of several processes, whose pipes reach the engine of this one."""
    engine, service, access, _ = records

    hub = Hub(
        Parts(
            engine=built.worker,
            metrics=metrics,
            adapters=built.counts,
            compiler=compiler,
            prepare_scores=built.late.prepare_scores,
            num_waiting=built.num_waiting,
        )
    )
    report_failed_reload(metrics.registry, lambda: any(s.keys_failed for s in hub.states))
    if access.tls_cert is not None:
        report_failed_certificate(
            metrics.registry, lambda: any(s.certificate_failed for s in hub.states)
        )
    welcome = texts_pb2.Welcome(
        info=built.info.SerializeToString(),
        tokenizer="" if pretrained.folder is None else str(pretrained.folder.absolute()),
        width=pretrained.card.model.vocab_size,
        max_calls=engine.max_waiting + built.rows,
    )
    return TextProcesses(
        hub,
        welcome,
        built.digests,
        arguments(*records),
        (access.host, service.port),
        service.text_port,
        service.service_processes,
        LedgerServer(accounts),
        _say,
    )


def _gathered(engine: EngineConfig, rank: Rank, pretrained: Pretrained) -> Leader:
    """Returns the leader of a group whose processes have all come and connected their devices."""

    def end(reason: str) -> None:
        leader.end(reason)
        _say(f"{reason}; the group has ended")
        end_process(0)

    leader = Leader(rank, facts(engine, pretrained), _say, _start_again, end)
    leader.gather()
    connect(rank)
    return leader


class _Built(NamedTuple):
    """A loaded model's parts of the service."""

    worker: EngineWorker  # not yet started
    info: pb.ModelInfo
    models: ServedModels
    digests: Callable[[], Mapping[str, str]]  # of the loaded adapters by their names
    counts: AdapterMetrics | None
    adapters: AbstractContextManager[None]  # followed, once the worker has started, until it ends
    rows: int  # sequences that the engine continues together
    num_waiting: Callable[[], int]  # choices that wait for a row
    late: LatePrograms  # not yet started


def _build(
    config: EngineConfig,
    service: ServiceConfig,
    pretrained: Pretrained,
    metrics: Metrics,
    leader: Leader | None,
) -> _Built:
    """Loads and compiles."""
    # Values that cannot be used are told before the weights are read.
    defaults = chosen_defaults(
        pretrained, service.generation_config, service.override_generation_config
    )
    if defaults:
        _say("sampling defaults: " + ", ".join(f"{n} {v}" for n, v in defaults.items()))
    keep_programs()
    card = pretrained.card

    def agree(limits: Limits) -> Limits:
        return limits if leader is None else leader.agree(limits)

    def explain() -> ServingError | None:
        return _PART_LOST if leader is not None and leader.loss_soon() else None

    prepared = prepare(config, pretrained, _say, agree)
    draft = prepared.draft
    broadcast = None if leader is None else leader.broadcast
    load = ExpertLoad(card.model, metrics.registry) if config.expert_metrics else None
    engine = engine_of(
        prepared.model,
        prepared.limits,
        prepared.steps,
        broadcast,
        load,
        config.max_decode_slowdown,
        proposer=proposer_of(config),
        drafter=None if draft is None else draft.drafter(),
    )
    if leader is not None:
        leader.await_ready()
    info = pb.ModelInfo(
        name=card.name,
        type="chat-completions",
        provider=card.provider,
        max_context=prepared.limits.max_context,
        vocab_size=card.model.vocab_size,
        sampling_defaults=pb.SamplingParams(**dict[str, Any](defaults)),
    )
    worker = EngineWorker(engine, metrics, explain)
    loader = AdapterLoader(engine, worker.call)
    models = ServedModels(card.name, service.model_alias, loader.digests)
    counts: AdapterMetrics | None = None
    adapters: AbstractContextManager[None] = nullcontext()
    if config.num_adapters:
        counts = AdapterMetrics(metrics.registry, card.name, loader.digests)
        adapters = followed_adapters(config, models, loader, counts, _say)
    late = LatePrograms(prepared.steps, _say)
    compilations = CompilationCount(apart=THREAD)
    engine.on_step = metrics.stepped
    metrics.watch(engine.scheduler, lambda: compilations.value, lambda: engine.num_failures)
    if isa := prepared.model.placement.kernels.isa:
        metrics.tell_kernels(isa)
        _say(f"kernels for CPU: {isa}")
    beside = None if draft is None else (draft.model, draft.steps)
    DeviceMemory(prepared.model, prepared.steps, metrics.registry, beside)
    return _Built(
        worker,
        info,
        models,
        loader.digests,
        counts,
        adapters,
        prepared.max_sequences,
        lambda: engine.scheduler.num_waiting,
        late,
    )


class _Server:
    """Serves gRPC until a signal, Drain, or the end of the engine or of a follower."""

    def __init__(
        self, worker: EngineWorker, late: LatePrograms, leader: Leader | None, config: ServiceConfig
    ) -> None:
        self._worker, self._late = worker, late
        self._leader = leader
        self._config = config

    async def run(self, make: Callable[[], Front], host: str) -> None:
        """Serves by the front that `make` returns; returns when running answers have finished or
        their time is up."""
        front = make()
        try:
            port = await front.start()
            _say(f"ready on {join_address(host, port)}")
            self._late.start()
            watch = asyncio.create_task(self._watch(front))
            await self._until_told(front)
            # Health comes first, so that load balancers send new requests elsewhere; requests that
            # come all the same are served during the delay, and then refused.
            await front.leave()
            if not front.was_told_to_end.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._engine_ended(), self._config.drain_delay)
            self._worker.drain()
            await front.finish(time.monotonic() + self._config.drain_seconds)
            watch.cancel()
        finally:
            front.kill()

    async def _until_told(self, front: Front) -> None:
        """Waits for the first reason to end."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if self._leader is not None:
            self._leader.on_leave = lambda reason: loop.call_soon_threadsafe(stop.set)
            self._leader.on_loss = lambda reason: self._worker.abandon(_PART_LOST)
        reasons = [
            asyncio.create_task(stop.wait()),
            asyncio.create_task(front.was_told_to_end.wait()),
            asyncio.create_task(self._engine_ended()),
            asyncio.create_task(front.failed()),
        ]
        done, _ = await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        for task in reasons:
            task.cancel()
        for task in done:
            task.result()

    async def _watch(self, front: Front) -> None:
        """Ends all requests, and so the process, when a step of the engine stands still."""
        seconds = self._config.step_timeout
        await until_stuck(self._worker.standing, seconds, beat)
        _say(f"a step takes longer than the {seconds:g} s of --step-timeout; the service ends")
        try:
            await front.leave()
        finally:
            self._worker.abandon(_STOOD_STILL)

    async def _engine_ended(self) -> None:
        while not self._worker.ended.is_set():
            await asyncio.sleep(0.1)


def _say(text: str) -> None:
    print(f"engine: {text}", file=sys.stderr, flush=True)


def _start_again(loss: str) -> NoReturn:
    """Ends this process of a group that lost a member; its supervisor starts it again."""
    _say(f"{loss}; the group starts again")
    end_process(1)
