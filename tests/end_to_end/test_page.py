"""The page to chat with before the real model, whose process is killed in mid-answer."""

from pathlib import Path

import psutil
import pytest

from tests.end_to_end.test_killed import service_of
from tests.support.browser import PageErrors, running_browser
from tests.support.servers import running, serve_command

pytestmark = pytest.mark.slow
PATIENCE = 120_000.0  # milliseconds
ANSWER = "article:last-child .body"
DONE = "article:last-child .buttons button:text-is('Regenerate')"


def test_a_person_chats_while_the_service_dies_and_comes_back(smollm2: Path) -> None:
    options = ("--kv-memory", "12")
    with running(serve_command(smollm2, *options)) as server, running_browser() as browser:
        assert f"page  {server.url}/" in server.banner
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        errors = PageErrors(page)
        page.goto(server.url)
        page.fill("#key", server.key)
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "12")
        page.fill("#prompt", "What is the capital of France?")
        page.click("#send")
        page.wait_for_selector(DONE)
        assert "Paris" in page.locator(ANSWER).text_content()
        page.click("article:last-child button:text-is('Tokens')")
        tokens = page.locator("article:last-child .t")
        # The last one ends the answer, and is no text of it.
        assert "".join(tokens.all_text_contents()).startswith("The capital of France is Paris")
        page.fill("#max_tokens", "600")
        page.fill("#prompt", "Write a long story about the river Seine.")
        page.click("#send")
        page.wait_for_function(
            "() => document.querySelectorAll('article')[3]?.textContent.length > 200"
        )
        psutil.Process(service_of(server).pid).kill()
        page.wait_for_selector("article:last-child .note-of >> text=Go on")
        before = page.locator(ANSWER).text_content()
        assert len(before) > 100
        page.fill("#max_tokens", "8")
        page.click("article:last-child .note-of >> text=Go on")
        again = page.locator("#problem button:text-is('Try again')")
        while page.locator(ANSWER).text_content() == before:
            page.wait_for_timeout(500)
            if again.is_visible() and again.is_enabled():
                again.click()
        page.wait_for_selector(DONE)
        assert page.locator(ANSWER).text_content().startswith(before)
        assert not errors.texts and not errors.foreign
