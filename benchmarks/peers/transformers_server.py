"""transformers under load; runs in the environment of that peer and imports nothing of ours.

transformers has no server that gathers requests, so batches are static: as many prompts as there
are clients go through `generate` together, and the next batch starts when all of them are done.
There is no HTTP either. A batch counts as sent when it starts.

Its arguments are a Hugging Face folder and the types of the weights.

Reads lines of JSON, {"dtype", "texts", "clients", "answer_tokens"}, and answers each with
{"answers": [{"sent", "arrivals", "prompt_tokens", "tokens"}]}, times in seconds of one clock. The
first line out is {"ready": true}.
"""

import json
import os
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria
from transformers.utils import logging


class Clock(StoppingCriteria):
    """Is asked after each token of a batch whether to stop: says no, and notes the time."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def batch(model: Any, tokenizer: Any, texts: list[str], tokens: int) -> list[dict[str, Any]]:
    """Continues all texts by exactly so many tokens. Returns an answer for each."""
    clock = Clock()
    sent = time.perf_counter()
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": text}] for text in texts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            stopping_criteria=[clock],
        )
    lengths = inputs["attention_mask"].sum(-1).tolist()
    same = {"sent": sent, "arrivals": clock.times, "tokens": len(clock.times)}
    return [{**same, "prompt_tokens": length} for length in lengths]


def main() -> None:
    """Answers lines of standard input until it ends."""
    folder, *dtypes = sys.argv[1:]
    # Libraries that print must not get between our lines.
    out, sys.stdout = sys.stdout, sys.stderr
    logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    models = {
        dtype: AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        for dtype in dtypes
    }
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        texts, clients = work["texts"], work["clients"]
        answers = []
        for start in range(0, len(texts), clients):
            chosen = texts[start : start + clients]
            answers += batch(models[work["dtype"]], tokenizer, chosen, work["answer_tokens"])
        print(json.dumps({"answers": answers}), file=out, flush=True)


if __name__ == "__main__":
    main()
