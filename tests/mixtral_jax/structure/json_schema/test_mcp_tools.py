"""Tools of ten public MCP servers, as each lists them (without descriptions): all are enforced.

`mcp_tools.json` was written from what the servers answered to `tools/list`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.structure.schema import read_parameters
from tests.mixtral_jax.structure.json_schema.walks import Vocabulary

SERVERS: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("mcp_tools.json").read_text(encoding="utf-8")
)


def test_there_are_ten_servers() -> None:
    assert len(SERVERS) == 10
    assert sum(len(server["tools"]) for server in SERVERS) == 127


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server["package"])
def test_every_tool_is_enforced(server: dict[str, Any]) -> None:
    vocabulary = Vocabulary.of_bytes()
    listed = []
    for name, parameters in server["tools"].items():
        schema = read_parameters(json.dumps(parameters))
        vocabulary.matcher(schema)
        assert schema.is_enforced
        listed += [f"{name}{entry}" for entry in schema.weakened]
        read_parameters(json.dumps(parameters), strict=True)
    if server["package"] == "@notionhq/notion-mcp-server":
        assert listed == [
            'API-post-page/properties/icon/format: format "json" is an annotation',
            'API-post-page/properties/cover/format: format "json" is an annotation',
        ]
    else:
        assert listed == []
