"""Tools that people point at a server, as their own packages, each in a process of its own.

What a tool does stands in its script in tests/clients; docs/clients.md has the others that were
tried, which take too long or too much of a disk to be installed here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convert.export import export
from tests.support.client_envs import CLIENTS, run_node, run_python
from tests.support.servers import Server, running, serve_command

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Server]:
    with running(serve_command(smollm2, "--kv-memory", "256")) as server:
        yield server


def test_llm(server: Server) -> None:
    run_python("llm", CLIENTS / "llm_tool.py", {"ENDPOINT": server.url, "KEY": server.key})


def test_semantic_kernel_over_https(smollm2: Path, pem: Path) -> None:
    options = ["--kv-memory", "256", "--tls-cert", str(pem), "--tls-key", str(pem)]
    with running(serve_command(smollm2, *options)) as server:
        place = {"ENDPOINT": server.url, "KEY": server.key}
        place |= {"SSL_CERT_FILE": str(pem), "REQUESTS_CA_BUNDLE": str(pem)}
        run_python("semantic-kernel", CLIENTS / "semantic_kernel_clients.py", place)


def test_aiperf(server: Server, smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((smollm2 / "tokenizer.json").read_bytes())
    config = {"model_type": "llama", "vocab_size": 49152}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    place = {"ENDPOINT": server.url, "KEY": server.key, "TOKENIZER": str(tmp_path)}
    run_python("aiperf", CLIENTS / "aiperf_tool.py", place, patience=300)


def test_every_provider_of_the_vercel_ai_sdk(server: Server) -> None:
    run_node(CLIENTS / "vercel_providers.mjs", {"ENDPOINT": server.url, "KEY": server.key})


def test_lm_eval_finds_what_transformers_computes(
    server: Server, smollm2: Path, tmp_path: Path
) -> None:
    """Multiple choice, and pages in windows of 64, beside transformers in float64.

    Against transformers in float32 they differ by up to 1e-5 a token, which is its rounding.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    export(smollm2, tmp_path / "hf")
    result = tmp_path / "result.json"
    place = {"ENDPOINT": server.url, "KEY": server.key, "RESULT": str(result)}
    place["TOKENIZER"] = str(tmp_path / "hf")
    run_python("lm-eval", CLIENTS / "lm_eval_scores.py", place, patience=400)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)

    def logprob(ids: list[int], num_last: int) -> float:
        with torch.no_grad():
            rows: Any = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        places = range(len(ids) - num_last, len(ids))
        return float(sum(rows[place - 1, ids[place]].item() for place in places))

    scores = json.loads(result.read_text(encoding="utf-8"))
    assert len(scores) == 14
    for context, text, found in scores:
        ids = tokenizer.encode(context + text)
        if context:
            wanted = logprob(ids, len(ids) - len(tokenizer.encode(context)))
        else:
            ids, wanted = [tokenizer.bos_token_id, *ids], 0.0
            for start in range(1, len(ids), 64):
                end = min(start + 64, len(ids))
                wanted += logprob(ids[max(0, end - 65) : end], end - start)
        assert found == pytest.approx(wanted, abs=1e-3), (context, text)
