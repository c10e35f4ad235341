"""The official JSON-Schema-Test-Suite, which jsonschema's source distribution contains."""

import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from mixtral_jax.errors import StructureError
from mixtral_jax.structure.schema import Schema, check, settle
from tests.mixtral_jax.structure.json_schema.walks import Vocabulary

DRAFTS = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, "--no-binary", "jsonschema", "jsonschema==4.26.0"], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / "jsonschema-4.26.0" / "json" / "tests"


@pytest.mark.soak
@pytest.mark.parametrize("draft", DRAFTS)
def test_nothing_invalid_is_accepted(suite: Path, draft: str) -> None:
    vocabulary = Vocabulary.of_bytes()
    counts: Counter[str] = Counter()

    def attempt(schema: Schema) -> None:
        vocabulary.matcher(schema)

    for file in sorted((suite / draft).glob("*.json")):
        if file.name == "vocabulary.json":
            continue  # its schemas have drafts of their own
        for group in json.loads(file.read_text(encoding="utf-8")):
            value = group["schema"]
            if isinstance(value, dict):
                value = {"$schema": DRAFTS[draft], **value}
            for strict in (False, True):
                try:
                    schema = settle(json.dumps(value), attempt, strict)
                except StructureError:
                    counts[f"refused {strict}"] += 1
                    continue
                counts[f"accepted {strict}"] += 1
                for case in group["tests"]:
                    text = json.dumps(case["data"], ensure_ascii=False)
                    where = f"{file.name}: {group['description']}: {case['description']}"
                    assert (check(text, schema) is None) == case["valid"], where
                    if schema.is_enforced and not case["valid"]:
                        assert not vocabulary.accepts(schema, text), where
                        counts["invalid refused"] += 1
    assert counts["accepted False"] > 0.85 * (counts["accepted False"] + counts["refused False"])
    assert counts["accepted True"] > 0.65 * (counts["accepted True"] + counts["refused True"])
