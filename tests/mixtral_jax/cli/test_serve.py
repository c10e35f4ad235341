"""What `mixtral-jax serve` opens in a browser."""

import threading
import webbrowser

import pytest

from mixtral_jax.cli import serve
from serving.command_line import app_of, command, run
from serving.flags import SERVE
from serving.launch.supervisor import Addresses


@pytest.mark.parametrize(
    ("host", "tls", "url"),
    [
        ("127.0.0.1", False, "http://127.0.0.1:8000/"),
        ("0.0.0.0", True, "https://127.0.0.1:8000/"),
        ("::", False, "http://[::1]:8000/"),
    ],
)
def test_the_page_is_opened_where_this_machine_reaches_it(host: str, tls: bool, url: str) -> None:
    assert Addresses(host=host, port=8000, grpc_port=1, tls=tls).page == url


def test_a_browser_is_opened_when_the_server_is_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    was_opened = threading.Event()

    def open_page(url: str) -> bool:
        opened.append(url)
        was_opened.set()
        return True

    monkeypatch.setattr(webbrowser, "open", open_page)
    serve._announce("ready", None)
    serve._announce("ready", "http://127.0.0.1:8000/")
    assert was_opened.wait(10)
    assert opened == ["http://127.0.0.1:8000/"]
    assert capsys.readouterr().out == "ready\nready\n"


def test_a_page_that_is_turned_off_cannot_be_opened(capsys: pytest.CaptureFixture[str]) -> None:
    app = app_of(command(serve._serve, SERVE))
    assert run(app, ["--model=tiny-random", "--open", "--no-page"]) == 1
    assert "--no-page" in capsys.readouterr().err
