"""The user's folders are where the platform has them; on Linux, by the XDG specification."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_jax.paths import cache_folder, settings_folder

FOLDERS = [
    (cache_folder, "XDG_CACHE_HOME", ".cache"),
    (settings_folder, "XDG_CONFIG_HOME", ".config"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="the specification of Linux desktops")
@pytest.mark.parametrize("folder, variable, usual", FOLDERS)
def test_the_xdg_specification(
    folder: Callable[[], Path],
    variable: str,
    usual: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("MIXTRAL_JAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    assert folder() == tmp_path / usual / "mixtral-jax"
    monkeypatch.setenv(variable, "")
    assert folder() == tmp_path / usual / "mixtral-jax"
    monkeypatch.setenv(variable, "/xdg")
    assert folder() == Path("/xdg/mixtral-jax")
    assert not list(tmp_path.iterdir())


def test_a_cache_of_our_own_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("MIXTRAL_JAX_CACHE", "/own")
    assert cache_folder() == Path("/own")
