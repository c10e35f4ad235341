"""The servers that are measured, ours and the peers: started, stopped between their turns, ended.

A peer that is not being measured is halted (SIGSTOP), because an idle one may still take a core:
vLLM's worker polls its queue without a pause, and threads of OpenMP spin. Ours sleeps when it is
idle, so it is left running.

Peers are set up as their own documentation advises for a CPU: all cores, both dtypes where they
have two, vLLM with the allocator and the threads it asks for as far as they are installed. vLLM by
itself sets one core aside for its front end and binds its threads to the others; here it is told to
use all, unless VLLM_CPU_OMP_THREADS_BIND is set: `auto` is its own choice.
"""

import ctypes.util
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.environments import Environments
from serving.bench.load import Answer, Endpoint, Level, measure, summary
from serving.bench.server import free_ports, served, started

_BIND = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True, kw_only=True)
class Load:
    """A measurement: texts, how many at a time, and how many tokens of answer each."""

    texts: Sequence[str]
    clients: int
    answer_tokens: int


@dataclass(frozen=True)
class Contender:
    """A name, such as "vllm float32", and the way to measure it."""

    name: str
    measure: Callable[[Load], Level]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The same for all: the weights in each one's form, and the room that they need."""

    checkpoint: Path
    hf: Path  # the same weights as a Hugging Face folder
    gguf: Path  # the same weights, quantised
    dtypes: Sequence[str]  # of transformers and vLLM
    clients: int  # at most
    context: int  # tokens of a sequence at most
    environments: Environments
    options: Mapping[str, str]  # of `mixtral-jax serve`


@contextmanager
def ours(setting: Setting) -> Iterator[Endpoint]:
    """Our server."""
    options = {"max-sequences": setting.clients, **setting.options}
    with served(str(setting.checkpoint), options) as endpoint:
        yield endpoint


@contextmanager
def peer(name: str, setting: Setting) -> Iterator[list[Contender]]:
    """A peer, in each of its variants."""
    with ExitStack() as stack:
        if name == "transformers":
            yield stack.enter_context(_transformers(setting))
        elif name == "llama.cpp":
            yield [stack.enter_context(_llama(setting))]
        else:
            yield [stack.enter_context(_vllm(setting, dtype)) for dtype in setting.dtypes]


def over_http(name: str, endpoint: Endpoint) -> Contender:
    """Returns a contender that is measured over HTTP."""

    def measure_load(load: Load) -> Level:
        return measure(
            endpoint, load.texts, concurrency=load.clients, max_tokens=load.answer_tokens
        )

    return Contender(name, measure_load)


@contextmanager
def _halted(contender: Contender, server: "subprocess.Popen[Any]") -> Iterator[Contender]:
    """The same contender, whose processes run while it is measured and stand still otherwise."""
    tree = psutil.Process(server.pid)

    def send(number: signal.Signals) -> None:
        for process in (tree, *tree.children(recursive=True)):
            process.send_signal(number)

    def measure_load(load: Load) -> Level:
        send(signal.SIGCONT)
        try:
            return contender.measure(load)
        finally:
            send(signal.SIGSTOP)

    try:
        yield Contender(contender.name, measure_load)
    finally:
        send(signal.SIGCONT)  # so that it can end


@contextmanager
def _vllm(setting: Setting, dtype: str) -> Iterator[Contender]:
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    # Its command `vllm` asks for a package of that name, which the CPU build is not.
    command = [str(setting.environments.python("vllm")), "-m"]
    command += ["vllm.entrypoints.openai.api_server", f"--model={setting.hf}"]
    command += ["--served-model-name=default", f"--dtype={dtype}", "--host=127.0.0.1"]
    command += [f"--port={port}", f"--max-model-len={setting.context}"]
    command += [f"--max-num-seqs={setting.clients}"]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        _BIND: os.environ.get(_BIND, f"0-{(os.cpu_count() or 1) - 1}"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(_preloads(setting.environments)),
    }
    with (
        started(command, f"{url}/health", environment=environment) as process,
        _halted(over_http(f"vllm {dtype}", Endpoint(url=url, model="default")), process) as halted,
    ):
        yield halted


def _preloads(environments: Environments) -> list[str]:
    # Debian's libtcmalloc-minimal4; Intel's is a requirement of vllm-cpu.
    allocator = ctypes.util.find_library("tcmalloc_minimal")
    threads = environments.folder / "vllm" / "lib" / "libiomp5.so"
    return [*([allocator] if allocator else []), *([str(threads)] if threads.exists() else [])]


@contextmanager
def _llama(setting: Setting) -> Iterator[Contender]:
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(setting.environments.llama_server), "--model", str(setting.gguf)]
    command += ["--offline", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", str(os.cpu_count()), "--parallel", str(setting.clients)]
    command += ["--ctx-size", str(setting.clients * setting.context)]
    # Otherwise slots are copied aside for prompts that do not come again.
    command += ["--cache-ram", "0"]
    with (
        started(command, f"{url}/health") as process,
        _halted(over_http("llama.cpp", Endpoint(url=url)), process) as halted,
    ):
        yield halted


@contextmanager
def _transformers(setting: Setting) -> Iterator[list[Contender]]:
    script = Path(__file__).with_name("transformers_server.py")
    command = [str(setting.environments.python("transformers")), str(script), str(setting.hf)]
    command += setting.dtypes
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ) as process:
        try:
            _line(process)
            yield [_static(process, dtype) for dtype in setting.dtypes]
        finally:
            process.terminate()


def _static(process: "subprocess.Popen[str]", dtype: str) -> Contender:
    def measure_load(load: Load) -> Level:
        assert process.stdin is not None
        work = {"dtype": dtype, "texts": list(load.texts), "clients": load.clients}
        process.stdin.write(json.dumps({**work, "answer_tokens": load.answer_tokens}) + "\n")
        process.stdin.flush()
        answers = [
            Answer(
                sent=answer["sent"],
                ended=answer["arrivals"][-1],
                arrivals=tuple(answer["arrivals"]),
                tokens=answer["tokens"],
                prompt_tokens=answer["prompt_tokens"],
            )
            for answer in _line(process)["answers"]
        ]
        return summary(load.clients, answers)

    return Contender(f"transformers {dtype}", measure_load)


def _line(process: "subprocess.Popen[str]") -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"transformers ended with status {process.wait()}; see above")
    return json.loads(line)
