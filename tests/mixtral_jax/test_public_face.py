"""The names that `import mixtral_jax` gives."""

import pytest


def test_the_public_face() -> None:
    import mixtral_jax

    assert mixtral_jax.__all__ == sorted(mixtral_jax.__all__)
    assert set(mixtral_jax._HOMES) == set(mixtral_jax.__all__)
    for name in mixtral_jax.__all__:
        assert getattr(mixtral_jax, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mixtral_jax.nothing
