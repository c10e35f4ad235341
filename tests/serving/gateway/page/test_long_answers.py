"""An answer of 10,000 tokens: the page's work for it is counted, and it can be used meanwhile.

`python -m benchmarks.page` measures the same in time, by the browser's own trace.
"""

from collections.abc import Callable
from typing import Any

import pytest

Open = Callable[..., Any]
TOKENS = 10_000
COUNT = """() => {
  window.counted = {frames: 0, characters: 0, nodes: 0};
  const frame = () => { window.counted.frames += 1; requestAnimationFrame(frame); };
  requestAnimationFrame(frame);
  const size = (record) => record.type === "characterData"
    ? record.target.length - record.oldValue.length
    : [...record.addedNodes].reduce((sum, node) => sum + node.textContent.length, 0);
  new MutationObserver((records) => {
    window.counted.nodes += records.reduce((sum, record) => sum + record.addedNodes.length, 0);
    window.counted.characters += records.reduce((sum, record) => sum + size(record), 0);
  }).observe(document.getElementById("messages"),
    {childList: true, subtree: true, characterData: true, characterDataOldValue: true});
}"""
TEXTS = {
    "a paragraph": ["word", " and", " *more*,"],
    "paragraphs and lists": [
        "word",
        " of\n\n",
        "- an",
        " item\n",
        "- another\n\n",
        "> and",
        "\n\n",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "shows_tokens"),
    [("a paragraph", False), ("paragraphs and lists", False), ("a paragraph", True)],
)
def test_the_work_for_a_token_does_not_grow(
    text: str, shows_tokens: bool, writing: Any, open_page: Open
) -> None:
    """A frame of the screen renders again a block of 3,000 characters at most."""
    stack, service = writing
    service.pieces = (TEXTS[text] * TOKENS)[:TOKENS]
    page = open_page(stack.url)
    page.set_checked("#shown", shows_tokens)
    page.evaluate(COUNT)
    page.fill("#prompt", "Write.")
    page.press("#prompt", "Enter")
    page.click("#toggle")  # the page answers to a person while it writes
    assert page.is_hidden("#settings")
    page.wait_for_selector("article.assistant", state="attached")
    page.wait_for_function("() => !document.querySelector('[aria-busy]')", timeout=60_000)
    counted = page.evaluate("() => window.counted")
    length = len("".join(service.pieces))
    if shows_tokens:
        assert page.locator("article:last-child .t").count() == TOKENS
        assert counted["nodes"] <= 2 * TOKENS + 100
        assert counted["characters"] <= 3 * length
    else:
        assert counted["characters"] <= 4 * length + 3500 * counted["frames"]
    assert "10000 tokens" in page.locator("article:last-child .figures").text_content()
    kept = page.evaluate("() => Object.keys(localStorage).length")
    page.reload()
    assert page.evaluate("() => Object.keys(localStorage).length") == kept
    shown = page.locator("article:last-child .body").text_content()
    assert letters(shown) == letters("".join(service.pieces))


def letters(text: str) -> str:
    """Returns a text without marks and spaces, which Markdown may take away."""
    return "".join(filter(str.isalpha, text))
