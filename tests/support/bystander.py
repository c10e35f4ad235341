"""A real server under attack, and a bystander: another caller, who asks small things meanwhile.

What a bystander may lose is counted, because times of a loaded machine say little: errors, bytes
that the server took before it refused, pages that stay held, peaks of each process's memory.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil

from mixtral_jax.checkpoint.pretrained import save
from mixtral_jax.config import ModelConfig
from mixtral_jax.tokenization.huggingface import TemplateTokenizer
from serving.proto import inference_pb2_grpc as rpc
from tests.support.models import model_of
from tests.support.servers import COMMAND, Server, free_ports, running, serve_command
from tests.support.tokenizers import write

PATIENCE = 60.0
CONTEXT = 4096
ATTACKER, BYSTANDER, POOR = "attacker", "bystander", "poor"
POOR_TOKENS = 50  # a minute
MOST_MEMORY = 1.5  # times what a process needs in quiet
# A chat whose only message is the system's renders to nothing.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
)


def checkpoint(folder: Path) -> Path:
    """Writes a toy model with a byte-level BPE, and a template as they are published."""
    tokenizer = TemplateTokenizer(write(folder / "tokenizer", template=TEMPLATE))
    config = dataclasses.replace(
        ModelConfig.tiny(vocab_size=tokenizer.vocab_size), sliding_window=None, max_context=CONTEXT
    )
    save(model_of(config), tokenizer, folder / "model")
    return folder / "model"


@dataclass
class Endpoint:
    """A running `mixtral-jax serve` with keys for each of the callers."""

    server: Server
    keys: dict[str, str]
    service: psutil.Process
    gateway: psutil.Process
    metrics: list[str]  # URLs
    quiet: dict[str, int] = field(default_factory=dict)  # peaks of memory in bytes, by process

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    def headers(self, caller: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[caller]}", "content-type": "application/json"}

    def client(self, caller: str) -> httpx.Client:
        return httpx.Client(
            base_url=self.server.url,
            headers=self.headers(caller),
            timeout=PATIENCE,
            trust_env=False,
        )

    def figures(self) -> dict[str, float]:
        """What service and gateway tell Prometheus, labels left out and added up."""
        figures: dict[str, float] = {}
        for url in self.metrics:
            for line in httpx.get(url, trust_env=False, timeout=PATIENCE).text.splitlines():
                name, _, value = line.rpartition(" ")
                if name and not line.startswith("#"):
                    name = name.partition("{")[0]
                    figures[name] = figures.get(name, 0) + float(value)
        return figures

    @contextmanager
    def stub(self, caller: str) -> Iterator[tuple[Any, Any]]:
        """A gRPC stub, and the caller's metadata."""
        options = [("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(self.server.target, options=options) as channel:
            yield rpc.InferenceStub(channel), (("api-key", self.keys[caller]),)

    @property
    def processes(self) -> dict[str, psutil.Process]:
        return {"service": self.service, "gateway": self.gateway}

    def forget_peaks(self) -> None:
        """Lets the peaks of memory begin anew."""
        for process in self.processes.values():
            # proc(5): 5 resets the peak of the resident set to what is resident now.
            Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")

    def peaks(self) -> dict[str, int]:
        """Peaks of the resident memory in bytes, by process."""
        found = {}
        for name, process in self.processes.items():
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
            found[name] = int(line.split()[1]) * 1024
        return found


def _keys(folder: Path) -> tuple[Path, dict[str, str]]:
    file, keys = folder / "keys.json", {}
    limits = {POOR: ["--tokens-per-minute", str(POOR_TOKENS)]}
    for name in (ATTACKER, BYSTANDER, POOR):
        command = [COMMAND, "keys", "add", name, "--file", str(file), *limits.get(name, [])]
        made = subprocess.run(command, check=True, capture_output=True, text=True)
        keys[name] = made.stdout.strip().splitlines()[-1]
    return file, keys


@contextmanager
def endpoint(folder: Path, *options: str) -> Iterator[Endpoint]:
    """Runs the server that is attacked, and finds out what memory it needs in quiet."""
    file, keys = _keys(folder)
    ports = free_ports(2)
    command = serve_command(
        checkpoint(folder), "--keys", str(file), "--usage-db", str(folder / "usage.db"),
        "--kv-memory", "16", "--metrics-port", str(ports[0]),
        "--gateway-metrics-port", str(ports[1]), *options,
    )  # fmt: skip
    with running(command) as server:
        children = psutil.Process(server.process.pid).children()
        (gateway,) = [child for child in children if "serving.gateway" in child.cmdline()]
        (service,) = [child for child in children if "serving" in child.cmdline()]
        urls = [f"http://127.0.0.1:{port}/metrics" for port in ports]
        found = Endpoint(server, keys, service, gateway, urls)
        with Bystander(found) as bystander:
            bystander.wait_for_answers(20)
        found.quiet = found.peaks()
        yield found


class Bystander:
    """Asks small chats, one after the other, until the block ends.

    Args:
        endpoint: the server.
        every: seconds from the start of a chat to the start of the next.
    """

    def __init__(self, endpoint: Endpoint, every: float = 0.0) -> None:
        self.errors: list[str] = []
        self.first_tokens: list[float] = []  # seconds to the first token, of each answer
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.small_chats", endpoint.server.url, "0.02",
             str(every)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "API_KEY": endpoint.keys[BYSTANDER]},
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "Bystander":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            assert self._process.wait(PATIENCE) == 0
        finally:
            self._process.kill()
            self._thread.join(PATIENCE)
            assert self._process.stdout
            self._process.stdout.close()

    def wait_for_answers(self, count: int) -> None:
        """Waits until `count` more chats were answered, or one has failed."""
        goal = len(self.first_tokens) + count
        deadline = time.monotonic() + PATIENCE
        while len(self.first_tokens) < goal and not self.errors:
            assert time.monotonic() < deadline, "the bystander waits for an answer"
            time.sleep(0.01)

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            found = json.loads(line)
            if isinstance(found, float):
                self.first_tokens.append(found)
            else:
                self.errors.append(found)


@contextmanager
def attacked(endpoint: Endpoint) -> Iterator[Bystander]:
    """Lets a bystander ask during the block, and checks that it has lost nothing by it.

    It has an answer before the attack, one during it and one after it, and no error; no process
    has needed MOST_MEMORY times its memory; and when all is over no page is held.
    """
    endpoint.forget_peaks()
    with Bystander(endpoint) as bystander:
        bystander.wait_for_answers(1)
        yield bystander
        bystander.wait_for_answers(2)
    assert not bystander.errors, bystander.errors[:3]
    deadline = time.monotonic() + PATIENCE
    while True:
        now = endpoint.figures()
        held = now["mixtral_pages"] - now["mixtral_free_pages"]
        busy = [now["vllm:num_requests_running"], now["vllm:num_requests_waiting"], held]
        if busy == [0, 0, 0]:
            break
        assert time.monotonic() < deadline, busy
        time.sleep(0.05)
    peaks = endpoint.peaks()
    for name, quiet in endpoint.quiet.items():
        assert peaks[name] < MOST_MEMORY * quiet, (
            f"the {name} needed {peaks[name] >> 20} MiB, {quiet >> 20} MiB in quiet"
        )
