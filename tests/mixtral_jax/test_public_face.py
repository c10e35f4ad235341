"""The names that `import mixtral_jax` gives."""

import ast
import inspect

import pytest

import mixtral_jax


def test_every_public_name_is_there() -> None:
    for name in mixtral_jax.__all__:
        assert getattr(mixtral_jax, name)
        assert name in dir(mixtral_jax)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mixtral_jax.nothing


def test_type_checkers_see_the_same_names() -> None:
    """They read the imports under TYPE_CHECKING, Python reads the table."""
    tree = ast.parse(inspect.getsource(mixtral_jax))
    seen = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mixtral_jax.")
        for alias in node.names
    }
    assert seen == {name: f"mixtral_jax.{home}" for name, home in mixtral_jax._HOMES.items()}
