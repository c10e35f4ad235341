"""The import law, and other things that hold for the tree as a whole."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mixtral_jax", "convert", "serving")

_BELOW_MODEL = {
    "axes",
    "config",
    "sharding",
    "cache",
    "native",
    "layers",
    "attention",
    "moe",
    "exchange",
}
_TOKENIZER = {"chat", "detokenizer", "template_tokenizer", "tokenizer"}
_MODEL = {*_BELOW_MODEL, "model"}
_PLAIN = {
    "serving.errors",
    "serving.pages",
    "serving.plan",
    "serving.request",
    "serving.scheduler",
    "serving.text",
}
_STUBS = {"serving.proto.inference_pb2", "serving.proto.inference_pb2_grpc"}
_ORDERS = {"serving.proto.group_pb2"}


def _ours(*names: str) -> set[str]:
    return {f"mixtral_jax.{name}" for name in names}


# Module -> what of ours it may import.
LAW: dict[str, set[str]] = {
    "mixtral_jax.axes": set(),
    "mixtral_jax.config": set(),
    "mixtral_jax.sharding": _ours("axes", "config"),
    "mixtral_jax.cache": _ours("axes", "config", "sharding"),
    "mixtral_jax.native": _ours("cache", "compilation"),
    "mixtral_jax.layers": _ours("axes", "config", "sharding", "native"),
    "mixtral_jax.tpu": _ours("axes", "cache", "layers"),
    "mixtral_jax.gpu": _ours("axes", "cache", "layers"),
    "mixtral_jax.attention": _ours(
        "axes", "config", "sharding", "native", "layers", "cache", "gpu", "tpu"
    ),
    "mixtral_jax.exchange": _ours("axes"),
    "mixtral_jax.moe": _ours(
        "axes", "config", "sharding", "native", "layers", "exchange", "gpu", "tpu"
    ),
    "mixtral_jax.model": _ours(*_BELOW_MODEL),
    "mixtral_jax.sampling": _ours("axes"),
    "mixtral_jax.step": _ours(*_MODEL, "sampling"),
    "mixtral_jax.compilation": set(),
    "mixtral_jax.shards": set(),
    "mixtral_jax.checkpoint": _ours(*_MODEL, "shards"),
    "mixtral_jax.generation": _ours(*_MODEL, "sampling", "step", *_TOKENIZER),
    "mixtral_jax.pretrained": _ours(*_MODEL, "checkpoint", *_TOKENIZER),
    **{f"mixtral_jax.{name}": _ours(*_TOKENIZER) for name in _TOKENIZER},
    "mixtral_jax": _ours(*_MODEL, "generation", "pretrained", *_TOKENIZER),
    **{name: _PLAIN for name in _PLAIN},
    "serving.keyring": set(),
    "serving.issuer": {"serving.errors"},
    "serving.entra": {"serving.errors", "serving.issuer"},
    "serving.access": {"serving.errors", "serving.keyring", "serving.entra"},
    "serving.access_flags": {"serving.access", "serving.entra", "serving.keyring", "serving.tls"},
    "serving.interceptor": {"serving.access", "serving.errors", "serving.keyring"},
    "serving.tls": set(),
    "mixtral_jax.hardware": set(),
    "mixtral_jax.hlo": set(),
    "mixtral_jax.traffic": _ours("hlo"),
    "mixtral_jax.topology": _ours("hardware"),
    "mixtral_jax.ahead": _ours(
        "config", "hardware", "model", "sharding", "step", "topology", "traffic"
    ),
    "mixtral_jax.spread": _ours("cache", "config", "hardware", "model", "sharding", "traffic"),
    "mixtral_jax.plan": _ours("ahead", "hardware", "spread", "traffic"),
    "mixtral_jax.plan_search": _ours(
        "ahead", "config", "hardware", "plan", "sharding", "spread", "topology"
    ),
    "mixtral_jax.plan_command": _ours(
        "cache", "checkpoint", "config", "hardware", "plan", "plan_search", "spread"
    ),
    "mixtral_jax.key_commands": {"serving.keyring"},
    "mixtral_jax.serve_command": {
        "serving.access_flags",
        "serving.gateway.usage",
        "serving.place",
        "serving.supervisor",
    },
    "serving.parent": set(),
    "serving.logs": set(),
    "serving.tracing": set(),
    "serving.calls": {"serving.metrics", "serving.tracing"} | _PLAIN,
    "serving.supervisor": {"serving.parent"},
    "serving.place": {"serving.access_flags", "serving.keyring"},
    "serving.orders": _PLAIN | _ORDERS,
    "serving.group": {"serving.orders", "serving.place"} | _PLAIN | _ORDERS,
    "serving.follower": {
        "serving.engine",
        "serving.engine_flags",
        "serving.group",
        "serving.orders",
        "serving.parent",
        "serving.place",
    }
    | _PLAIN
    | _ORDERS
    | _ours("compilation", "pretrained"),
    "serving.channel": set(),
    "serving.client": {"serving.channel", "serving.conversation", "serving.errors", *_STUBS},
    "serving.conversation": {"serving.errors", *_STUBS},
    "serving.load": set(),
    "serving.bench": {"serving.load"},
    "serving.offline": {
        "serving.engine",
        "serving.load",
        *_PLAIN,
        *_ours("checkpoint", "compilation", "model", "pretrained"),
    },
    "serving.shares": _PLAIN,
    "serving.runner": _ours("axes", "model", "sampling", "step") | _PLAIN,
    "serving.engine": _ours("model", "step") | _PLAIN | {"serving.runner", "serving.shares"},
    "serving.memory": set(),
    "serving.metrics": _PLAIN | {"serving.shares"},
    "serving.worker": {"serving.engine", "serving.metrics"} | _PLAIN,
    "serving.choices": _PLAIN | _STUBS | _ours("tokenizer"),
    "serving.translation": {"serving.engine"} | _PLAIN | _STUBS | _ours("tokenizer"),
    "serving.service": {
        "serving.access",
        "serving.calls",
        "serving.choices",
        "serving.interceptor",
        "serving.tls",
        "serving.translation",
        "serving.worker",
    }
    | _PLAIN
    | _STUBS
    | _ours("tokenizer"),
    "serving.engine_flags": {
        "serving.engine",
        "serving.memory",
        "serving.plan",
        *_ours("cache", "config", "model", "native", "pretrained", "sharding", "step"),
    },
    "serving.__main__": {
        "serving.access",
        "serving.access_flags",
        "serving.calls",
        "serving.engine",
        "serving.keyring",
        "serving.logs",
        "serving.tls",
        "serving.tracing",
        "serving.metrics",
        "serving.parent",
        "serving.service",
        "serving.worker",
        *_PLAIN,
        *_STUBS,
        "serving.engine_flags",
        "serving.follower",
        "serving.group",
        "serving.place",
        *_ours("compilation", "pretrained"),
    },
}
_GATEWAY = (
    _STUBS
    | {
        "serving.access",
        "serving.access_flags",
        "serving.channel",
        "serving.keyring",
        "serving.tls",
    }
    | {"serving.errors", "serving.logs", "serving.parent", "serving.tracing"}
)


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "_pb2" not in path.name:
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of ours that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known | _STUBS | _ORDERS else node.module)
    return {name for name in found if name.partition(".")[0] in PACKAGES}


def allowed(module: str, known: set[str]) -> set[str]:
    if module == "mixtral_jax.cli":
        return known
    if module.partition(".")[0] == "convert":
        return {name for name in known if name.startswith(("mixtral_jax", "convert"))}
    if module.startswith("serving.gateway"):
        return _GATEWAY | {name for name in known if name.startswith("serving.gateway")}
    return LAW[module]


def test_the_import_law() -> None:
    found = modules()
    assert len(found) > 20  # the walk itself works
    broken = {}
    for module, path in found.items():
        if path.read_text().strip() and (
            over := imports(path, set(found)) - allowed(module, set(found)) - {module}
        ):
            broken[module] = over
    assert not broken


def test_nobody_imports_the_command_line() -> None:
    found = modules()
    for path in found.values():
        assert "mixtral_jax.cli" not in imports(path, set(found))


@pytest.mark.parametrize(
    "module", ["serving.gateway.app", "serving.client", "serving.supervisor", "mixtral_jax.cli"]
)
def test_these_start_without_jax(module: str) -> None:
    """Also through others: what they import must not import it either."""
    code = f"import {module}, sys; print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_every_config_field_is_read_by_the_model() -> None:
    """A value in the config that nobody reads is a model that is silently wrong."""
    import dataclasses

    from mixtral_jax.config import ModelConfig

    source = "".join(
        (ROOT / "mixtral_jax" / f"{name}.py").read_text()
        for name in ("config", "layers", "attention", "moe", "model", "cache", "generation")
    )
    # max_context does not change the mathematics: the loop and the server read it.
    for field in dataclasses.fields(ModelConfig):
        assert f"config.{field.name}" in source or f"self.{field.name}," in source, field.name


def test_every_make_target_explains_itself() -> None:
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ["install", "serve", "chat", "test", "check", "proto", "bench", "notebooks"]:
        assert f"make {target} " in out.stdout


def test_the_public_face() -> None:
    import mixtral_jax

    assert mixtral_jax.__all__ == sorted(mixtral_jax.__all__)
    assert set(mixtral_jax._HOMES) == set(mixtral_jax.__all__)
    for name in mixtral_jax.__all__:
        assert getattr(mixtral_jax, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mixtral_jax.nothing
