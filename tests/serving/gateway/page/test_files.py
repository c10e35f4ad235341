"""The files of the page over HTTP: headers, what a browser keeps, sizes, what they refer to."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving.gateway.page import files
from serving.gateway.page.files import POLICY, read_page
from tests.support.fakes import running_stack

FOLDER = Path(files.__file__).parent
SCRIPTS = sorted(FOLDER.glob("*.js"))
MOST_BYTES = 150_000


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running_stack() as stack, httpx.Client(base_url=stack.url) as client:
        yield client


def test_the_page_needs_no_key_and_says_what_a_browser_may_do(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    for wanted in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
        assert wanted in POLICY
    assert "unsafe" not in POLICY and "http" not in POLICY


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("main.js", "text/javascript; charset=utf-8"),
        ("style.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
    ],
)
def test_a_file_is_sent_once(name: str, kind: str, client: httpx.Client) -> None:
    first = client.get(f"/page/{name}")
    assert (first.status_code, first.headers["content-type"]) == (200, kind)
    assert first.headers["cache-control"] == "no-cache"
    again = client.get(
        f"/page/{name}", headers={"if-none-match": f'"other", W/{first.headers["etag"]}'}
    )
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert client.head(f"/page/{name}").headers["content-length"] == str(len(first.content))


@pytest.mark.parametrize("name", ["files.py", "..%2Ffiles.py", "%2e%2e/app.py", "__init__.py", "x"])
def test_nothing_else_is_served(name: str, client: httpx.Client) -> None:
    assert client.get(f"/page/{name}").status_code == 404


def test_it_can_be_turned_off() -> None:
    with running_stack(page=False) as stack, httpx.Client(base_url=stack.url) as client:
        for path in ("/", "/page/main.js"):
            answer = client.get(path)
            assert answer.status_code == 404
            assert "--no-page" in answer.json()["error"]["message"]


def test_it_is_small() -> None:
    assert 10_000 < sum(len(file.content) for file in read_page().values()) <= MOST_BYTES


def test_it_refers_to_its_own_files_only(client: httpx.Client) -> None:
    """A browser under the prefix of a proxy finds them too: no address is absolute."""
    html = client.get("/").text
    referred = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', html))
    for script in SCRIPTS:
        imported = re.findall(
            r'^(?:import|} from).*?"\./([^"]+)";$', script.read_text("utf-8"), re.M
        )
        referred |= {f"page/{name}" for name in imported}
    assert referred == {f"page/{name}" for name in read_page()} - {"page/index.html"}
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    assert "url(" not in style and "@import" not in style
    assert "style=" not in html and "<style" not in html and not re.search(r"\son\w+=", html)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_no_script_turns_text_into_markup(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    for name in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "DOMParser",
    ):
        assert name not in text
