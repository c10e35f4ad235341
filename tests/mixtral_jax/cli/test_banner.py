"""What `mixtral-jax serve` prints about its key, by where the key is from and where it prints."""

from pathlib import Path

import pytest

from mixtral_jax.cli.banner import banner, shown_key
from serving.errors import SetupError

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "mixtral-jax"


def shown(key: str | None = KEY, **changes: bool) -> str:
    """The banner, without the lines that are always there."""
    usual = {"is_made_up": False, "asks_key": True, "has_file": False, "is_terminal": True}
    facts = usual | changes
    text, bearer = shown_key(key, 8000, **facts)
    return banner("http://h:8000", "h:50051", text, bearer)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_given_key_is_not_shown_and_not_written(is_terminal: bool, state: Path) -> None:
    text = shown(is_terminal=is_terminal)
    assert KEY not in text and not state.exists()
    assert "\nkey   the one in MIXTRAL_JAX_API_KEY\n" in text
    assert '-H "Authorization: Bearer $MIXTRAL_JAX_API_KEY"' in text


def test_a_made_up_key_is_for_a_terminal(state: Path) -> None:
    text = shown(is_made_up=True)
    assert f"\nkey   {KEY}\n" in text and f"Bearer {KEY}" in text
    assert not state.exists()


def test_elsewhere_it_is_in_a_file_of_its_owner(state: Path) -> None:
    text = shown(is_made_up=True, is_terminal=False)
    file = state / "key-8000"
    assert KEY not in text
    assert f"\nkey   in {file}\n" in text and f'Bearer $(cat {file})"' in text
    assert file.read_text(encoding="utf-8") == f"{KEY}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)  # as another program left it
    shown("f" * 16, is_made_up=True, is_terminal=False)
    assert file.read_text(encoding="utf-8") == "f" * 16 + "\n"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(state: Path) -> None:
    state.parent.write_text("no folder", encoding="utf-8")
    with pytest.raises(SetupError, match="set MIXTRAL_JAX_API_KEY yourself"):
        shown(is_made_up=True, is_terminal=False)


def test_keys_of_a_file_and_no_keys() -> None:
    text = shown(None, has_file=True)
    assert "\nkey " not in text and 'Bearer $KEY"' in text
    assert 'Bearer $TOKEN"' in shown(None)
    assert "Authorization" not in shown(None, asks_key=False)
    assert "Authorization" not in shown(KEY, asks_key=False)
