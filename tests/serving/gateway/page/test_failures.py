"""What the page says and keeps when something fails, and text that attacks it."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serving.flags import KEY_VARIABLE, SERVICE_KEY_VARIABLE
from tests.serving.gateway.page.test_chat import ask, asked, bodies, ended
from tests.serving.gateway.page.test_markdown import ATTACKS
from tests.support.fakes import KEY, Stack
from tests.support.servers import free_ports

Open = Callable[..., Any]


def shows(page: Any, answer: str) -> None:
    """Waits until an answer that still comes has this text."""
    page.wait_for_function(
        "(answer) => document.querySelector('.assistant .body').textContent === answer", arg=answer
    )


def problem(page: Any, words: str) -> str:
    """Waits until the page tells a problem in these words; returns all that it tells."""
    page.wait_for_function(
        "(words) => document.getElementById('problem').textContent.includes(words)", arg=words
    )
    return str(page.locator("#problem").text_content())


def test_a_wrong_key_is_told_and_can_be_corrected(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url, key="wrong-key-of-this-server")
    problem(page, "does not know this key")
    with page.expect_response("**/v1/chat/completions"):
        ask(page, "one")
    # The problem of before says the same: what tells the new one is that the empty answer goes.
    page.wait_for_function("() => document.querySelectorAll('article').length === 1")
    problem(page, "does not know this key")
    assert bodies(page) == ["one"]  # the question stays
    page.click("text=Enter the key")
    assert page.evaluate("document.activeElement.id") == "key"
    page.click("#forget")
    page.reload()
    problem(page, "asks for a key")


def test_an_answer_to_the_key_before_is_no_news(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    page.click("#forget")
    held: list[Any] = []
    page.route("**/v1/models", lambda route: held.append(route), times=1)
    page.reload()
    with page.expect_response("**/v1/models"):
        page.fill("#key", KEY)
        page.dispatch_event("#key", "change")
    with page.expect_response("**/v1/models"):
        held[0].fulfill(status=401, json={"error": {"message": "late"}})
    page.wait_for_timeout(100)
    assert page.locator("#problem").text_content() == ""


def test_a_full_queue_counts_down_and_is_tried_again(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)

    def answer_for_longer(route: Any) -> None:
        """The server's one second may be over before it is read."""
        refused = route.fetch()
        assert refused.headers["retry-after"] == "1"
        route.fulfill(response=refused, headers=refused.headers | {"retry-after": "6"})

    page.route("**/v1/chat/completions", answer_for_longer, times=1)
    ask(page, "!fail:Overloaded")
    text = problem(page, "too much to do")
    assert re.search(r"Try again in \d+ s\.", text), text
    again = page.locator("#problem button")
    assert again.is_disabled()
    again.click()  # Playwright waits until it may be pressed
    problem(page, "too much to do")  # which the press has taken away
    assert len(stack.service.requests) == 2
    assert bodies(page) == ["!fail:Overloaded"]


def refuse_once(page: Any) -> None:
    """Has the next chat be refused, as a server that is starting does."""
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=503, json={"error": {"message": "later"}}),
        times=1,
    )


def test_a_regenerated_answer_that_fails_comes_back_and_is_tried_again(
    stack: Stack, open_page: Open
) -> None:
    page = open_page(stack.url)
    ask(page, "one", "one")
    refuse_once(page)
    page.click("article:last-child >> text=Regenerate")
    problem(page, "not ready")
    assert bodies(page) == ["one", "one"]
    page.locator("#problem button").click()
    ended(page, "one")
    assert bodies(page) == ["one", "one"]
    assert asked(stack) == [("user", "one")]
    assert len(stack.service.requests) == 2


def test_a_new_chat_has_no_problem_of_the_one_before(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    refuse_once(page)
    ask(page, "one")
    problem(page, "not ready")
    page.click("#new")
    assert page.locator("#problem").text_content() == ""


@pytest.mark.parametrize(
    ("asked_for", "words"),
    [
        ("!fail:Unavailable", "not ready"),
        ("!long", "context"),
        ("!fail:EngineFailure", "refused"),
    ],
)
def test_other_refusals_are_told(asked_for: str, words: str, stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    ask(page, asked_for)
    problem(page, words)
    page.wait_for_selector("#problem button")


def test_an_answer_that_breaks_off_stays_and_goes_on(stack: Stack, open_page: Open) -> None:
    page = open_page(stack.url)
    ask(page, "one two !wait !vanish")
    shows(page, "one two")
    page.reload()  # in mid-answer
    assert bodies(page) == ["one two !wait !vanish", "one two"]
    assert "broke off" in page.locator("article:last-child .note-of").text_content()
    stack.service.reset()
    page.click("article:last-child .note-of >> text=Regenerate")
    shows(page, "one two")
    stack.service.release()
    page.wait_for_selector("article:last-child .note-of >> text=Go on")
    assert "broke off" in page.locator("article:last-child .note-of").text_content()
    page.click("article:last-child .note-of >> text=Go on")
    ended(page, "one twoone two")
    assert asked(stack)[-1] == ("assistant", "one two")


@contextmanager
def gateway(target: str, port: int) -> Iterator[str]:
    """Runs the gateway's command before a service, and kills it when the block ends."""
    command = [sys.executable, "-m", "serving.gateway", f"--port={port}", f"--target={target}"]
    environment = os.environ | {KEY_VARIABLE: KEY, SERVICE_KEY_VARIABLE: KEY}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())
            assert url is not None
            yield url[0]
        finally:
            process.kill()


def test_a_server_that_is_killed_in_mid_answer(stack: Stack, open_page: Open) -> None:
    """What had come stays, and the next server, at the same address, goes on from there."""
    (port,) = free_ports(1)
    with gateway(stack.target, port) as url:
        page = open_page(url)
        ask(page, "one !wait two")
        shows(page, "one")
    page.click("article:last-child .note-of >> text=Go on")
    problem(page, "cannot be reached")
    assert bodies(page) == ["one !wait two", "one"]
    with gateway(stack.target, port):
        page.click("#problem >> text=Try again")
        ended(page, "oneone")
        assert asked(stack)[-1] == ("assistant", "one")


def test_attacks_in_answers_run_nothing(writing: Any, open_page: Open) -> None:
    stack, service = writing
    page = open_page(stack.url)
    asked_for = []
    page.on("request", lambda request: asked_for.append(request.url))
    for shown in (False, True):
        page.set_checked("#shown", shown)
        service.pieces = [piece for attack in ATTACKS for piece in (*attack, "\n\n")]
        page.fill("#prompt", ATTACKS[0])
        page.press("#prompt", "Enter")
        page.wait_for_function("() => !document.querySelector('[aria-busy]')")
    page.wait_for_selector("article >> nth=3")
    page.reload()
    assert page.evaluate("window.hacked === undefined")
    assert not page.evaluate(
        "() => document.querySelectorAll('article :is(script, img, svg, iframe, style, form, meta,"
        " base, input, object, embed)').length"
    )
    assert {url.removeprefix(stack.url).split("/")[1] for url in asked_for} <= {"", "page", "v1"}


def test_the_policy_refuses_scripts_that_a_fault_would_let_through(
    stack: Stack, browser: Any
) -> None:
    page = browser.new_page()
    page.goto(stack.url)
    refused = page.evaluate(
        """async () => {
          const refused = [];
          const note = (event) => refused.push(event.effectiveDirective);
          document.addEventListener("securitypolicyviolation", note);
          const script = document.createElement("script");
          script.setAttribute("nonce", "x");
          try { script.text = "window.hacked = 1"; } catch { refused.push("trusted types"); }
          try { document.body.innerHTML = "<b>x</b>"; } catch { refused.push("trusted types"); }
          const image = document.createElement("img");
          image.src = "http://127.0.0.1:9/pixel.png";
          document.body.append(image);
          await fetch("http://127.0.0.1:9/").catch(() => {});
          await new Promise((resolve) => setTimeout(resolve, 100));
          return refused;
        }"""
    )
    assert {"trusted types", "img-src", "connect-src"} <= set(refused)
    assert page.evaluate("window.hacked === undefined")
    page.close()
