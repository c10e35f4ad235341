"""lm-evaluation-harness by its `local-completions`: multiple choice, and perplexity in windows.

The tasks are made here, without network. The file RESULT gets what the harness has found, as JSON:
context, empty for a page, continuation and log-likelihood of each request.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL, KEY, TOKENIZER = os.environ["ENDPOINT"], os.environ["KEY"], os.environ["TOKENIZER"]
ENDINGS = {
    "The baker opens the oven and": ["takes out the bread.", "swims to the moon.", "seven."],
    "She walks to the window and looks": ["outside.", "the spoon loudly.", "inside the window."],
    "Question: What is the capital of France?\nAnswer:": ["Paris", "Rome", "Berlin"],
    "Question: How many days has a week?\nAnswer:": ["five", "six", "seven"],
}
PAGES = ["The river ran past the old mill . " * 20, "Nobody could say why . " * 3]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/{name}.json}}}}
validation_split: validation
task: {name}
metadata: {{version: 1}}
"""
CHOICES = """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: 0
doc_to_choice: endings
metric_list: [{metric: acc}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: byte_perplexity}]
"""
TASKS = {
    "choices": (CHOICES, [dict(context=c, endings=e) for c, e in ENDINGS.items()]),
    "pages": (ROLLING, [dict(page=page) for page in PAGES]),
}

with tempfile.TemporaryDirectory() as place:
    for name, (task, documents) in TASKS.items():
        text = COMMON.format(folder=place, name=name) + task
        Path(place, f"{name}.yaml").write_text(text, encoding="utf-8")
        lines = "\n".join(json.dumps(document) for document in documents)
        Path(place, f"{name}.json").write_text(lines, encoding="utf-8")
    settings = f"model=azureai,base_url={URL}/v1/completions,tokenizer={TOKENIZER}"
    settings += ",tokenizer_backend=huggingface,num_concurrent=2,max_length=66"
    command = [str(Path(sys.executable).with_name("lm_eval")), "run", "--include_path", place]
    command += ["--model", "local-completions", "--model_args", settings, "--batch_size", "4"]
    command += ["--tasks", ",".join(TASKS), "--log_samples", "--output_path", f"{place}/out"]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{place}/hf", "OPENAI_API_KEY": KEY}
    done = subprocess.run(
        command, cwd=place, env={**os.environ, **quiet}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    scores = []
    for path in Path(place, "out").rglob("samples_*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            for asked, answers in zip(sample["arguments"].values(), sample["resps"], strict=True):
                answer = answers[0][0] if isinstance(answers[0], list) else answers[0]
                scores.append(["", *asked.values()][-2:] + [float(answer)])
    Path(os.environ["RESULT"]).write_text(json.dumps(scores), encoding="utf-8")
