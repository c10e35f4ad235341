"""Sampling parameters that a model's page recommends, where its files name none.

They are written into `generation_config.json` beside the tokenizer, from where a server reads the
values that hold for requests without their own.
"""

import json
import re
from pathlib import Path

from mixtral_jax.checkpoint.sampling_defaults import SAMPLING_NAMES
from mixtral_jax.errors import TokenizerError
from mixtral_jax.tokenization.special_tokens import GENERATION_CONFIG, read_object

# Names of sources, in lower case. The values of SmolLM2 are those of the example on its page:
# https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
# In the file of four bits that `pull` fetches the first words of an answer are less certain (what
# the capital of France is, it answers in French as often as two times in five): it needs a
# narrower choice.
_RECOMMENDED = (
    (r"smollm2-135m-instruct\.q4_1", {"temperature": 0.2, "top_p": 0.5}),
    (r"smollm2-(135m|360m|1\.7b)-instruct(\..*)?", {"temperature": 0.2, "top_p": 0.9}),
)


def add_recommended(folder: Path, name: str) -> None:
    """Adds what is recommended for a model to the generation_config.json of a checkpoint.

    Nothing is changed where nothing is recommended, or the file names values of its own.

    Args:
        folder: of the checkpoint, with the files of its tokenizer.
        name: of the source's folder, or of its file without the last ending.
    """
    known = (values for name_of, values in _RECOMMENDED if re.fullmatch(name_of, name.lower()))
    values = next(known, None)
    file = folder / GENERATION_CONFIG
    try:
        content = read_object(file)
    except TokenizerError:
        return  # whoever serves it is told what is wrong with the file
    if values is None or any(content.get(key) is not None for key in SAMPLING_NAMES):
        return
    file.unlink(missing_ok=True)  # a copy of a read-only file is read-only too
    file.write_text(json.dumps({**content, **values}, indent=2) + "\n", encoding="utf-8")
