"""Chromium as a person's browser: Debian's package, driven by Playwright.

Playwright brings no browser here: `apt-get install chromium` does, and `.ci/run` calls it. Without
either a test is skipped and says why; with PARITY=1 it fails, so that CI skips none.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# A process of root has no sandbox, and the pages are our own.
_ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage", "--force-color-profile=srgb"]


def chromium() -> str:
    """Returns the path of the browser; skips the test, or fails it, where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    missing = [name for name in ("playwright", "axe_playwright_python") if find_spec(name) is None]
    if path is None:
        missing.insert(0, "chromium")
    if path is not None and not missing:
        return path
    reason = (
        f"pages are tested in a browser, and {', '.join(missing)} is not installed here: "
        "`apt-get install chromium`, and the extra `test`"
    )
    if os.environ.get("PARITY") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def running_browser() -> Iterator[Any]:
    """Runs the browser without a window; yields Playwright's `Browser`."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def axe_source() -> str:
    """Returns axe-core, which checks a page's accessibility, as JavaScript."""
    from importlib.resources import files

    return (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


class PageErrors:
    """Collects what a page reports as wrong: exceptions, and what its policy has refused.

    Args:
        page: Playwright's `Page`.
    """

    def __init__(self, page: Any) -> None:
        self.texts: list[str] = []
        self.foreign: list[str] = []
        """Addresses outside the page's own server that it asked for."""
        page.on("pageerror", lambda error: self.texts.append(str(error)))
        page.on("console", self._note)
        page.on("request", self._note_request)
        self._page = page

    def _note(self, message: Any) -> None:
        # A status that is not 2xx is told by the browser itself, and by the page.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.texts.append(message.text)

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.foreign.append(request.url)
