"""Training steps of torch, transformers and peft; imports nothing of ours.

Its argument is a JSON object, {"rows", "length", "rank", "steps", "dtype"}: a model of
SmolLM2-135M's shape with random weights, or of the Hugging Face folder "hf". Prints one line of
JSON. The first step is not counted.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model


def main() -> None:
    """Computes the steps."""
    work = json.loads(sys.argv[1])
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    base = _base(work["hf"], getattr(torch, work["dtype"]))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=work["rank"], lora_alpha=32, target_modules=targets)
    model = get_peft_model(base, settings)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, base.config.vocab_size, (work["rows"], work["length"]))
    seconds, cpu_seconds = [], []
    for _ in range(work["steps"] + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(loss.detach())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    figures = {"seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:], "peak_bytes": peak << 10}
    print(json.dumps(figures))


def _base(folder: str | None, dtype: torch.dtype) -> Any:
    if folder is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


if __name__ == "__main__":
    main()
