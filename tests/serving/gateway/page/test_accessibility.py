"""axe-core, which knows WCAG's rules, on the page in its states; and the keyboard alone."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.serving.gateway.page.test_chat import ask, ended
from tests.support.browser import axe_source

Open = Callable[..., Any]
# Headings, a list, code, a table, a quotation and links: all that an answer may have.
ANSWER = """# Title

Text with `code`, **weight** and [a link](https://example.org/).

- one
- two

```python
print("a line of code that is wider than a telephone is, so that it has to be scrolled to be read")
```

| a | b |
|---|---|
| 1 | 2 |

> quoted
"""
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}


def violations(page: Any) -> list[str]:
    """Returns what axe finds wrong, with the places."""
    # The page's policy would not let a script of another origin in, so the browser runs it itself.
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(axe_source())
    outcome = page.evaluate("async () => await axe.run(document, {resultTypes: ['violations']})")
    assert len(outcome["passes"]) > 20  # it has looked
    return [
        f"{rule['id']}: {rule['help']}: {[node['html'][:200] for node in rule['nodes']]}"
        for rule in outcome["violations"]
    ]


@pytest.mark.parametrize(
    ("size", "theme"),
    [
        ("phone", "dark"),
        ("desktop", "light"),
        pytest.param("phone", "light", marks=pytest.mark.soak),
        pytest.param("desktop", "dark", marks=pytest.mark.soak),
    ],
)
def test_nothing_keeps_anybody_out(size: str, theme: str, writing: Any, open_page: Open) -> None:
    stack, service = writing
    service.pieces = [ANSWER[i : i + 4] for i in range(0, len(ANSWER), 4)]
    width, height = SIZES[size]
    page = open_page(stack.url, color_scheme=theme, viewport={"width": width, "height": height})
    page.select_option("#format", "json_schema")
    page.click("#add-function")
    assert not violations(page)  # the settings, and the page without a message
    page.select_option("#format", "text")
    page.click("text=Remove the function")
    if size == "phone":
        page.click("#close")
    ask(page, "What?")
    page.wait_for_selector("article:last-child.assistant .buttons button")
    assert not violations(page)
    page.click("article:last-child button:text-is('Tokens')")
    page.locator(".t2").first.click()
    assert not violations(page)  # with the list of other tokens
    page.keyboard.press("Escape")
    page.click("article:last-child button:text-is('Edit')")
    service.pieces = []
    ask(page, "Again?")
    page.evaluate(
        """() => document.getElementById("problem").append("A problem. ",
          Object.assign(document.createElement("button"), {textContent: "Try again"}))"""
    )
    assert not violations(page)
    # Nothing is wider than the screen.
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_everything_is_done_by_keys(writing: Any, open_page: Open) -> None:
    stack, service = writing
    service.pieces = ["a"]
    page = open_page(stack.url)
    page.reload()
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    ended(page, "a")
    assert service.requests[-1].chat.messages[0].content == "one\ntwo"
    service.pieces, service.pause = ["b"] * 1000, 0.01
    page.keyboard.type("more")
    page.keyboard.press("Enter")
    page.wait_for_selector("[aria-busy] p")
    page.keyboard.press("Escape")
    page.wait_for_selector("article:last-child .note-of >> text=Go on")
    service.pause = 0.0
    reached = set()
    focused = "() => document.activeElement.id || document.activeElement.textContent"
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(focused))
    assert {"scroller", "model", "new", "dark", "toggle", "prompt"} <= reached
    assert {"Go on", "Regenerate", "key", "temperature", "system", "export"} <= reached


def test_a_screen_reader_is_told_the_beginning_and_the_end(writing: Any, open_page: Open) -> None:
    """And not every token: only two texts change in a region that is read aloud."""
    stack, service = writing
    service.pieces, service.pause = ["word "] * 100, 0.005
    page = open_page(stack.url)
    page.evaluate(
        """() => {
          window.told = [];
          const regions = "[role=status], [role=alert], [aria-live]";
          for (const region of document.querySelectorAll(regions))
            new MutationObserver(() => window.told.push(region.textContent))
              .observe(region, {childList: true, subtree: true, characterData: true});
        }"""
    )
    ask(page, "x", ("word " * 100).strip())
    told = page.evaluate("() => window.told.filter((text) => text)")
    assert told == ["The answer begins.", "The answer is complete: 100 tokens."]
    assert page.locator("[role=log]").count() == 0
    service.pause = 0.0
