"""The page to chat with, measured in a browser: its longest task, and when a first token is seen.

    python -m benchmarks.page [--tokens 10000] [--rate 200]

A service writes an answer at the given rate; the real gateway passes it on to Chromium without a
window, which traces itself. Three answers are measured: one of Markdown, one of a single paragraph,
and the first shown as tokens with their probabilities. A task is told by the wall clock and by its
own processor time: what else runs on the machine shows in the first alone. A first token's delay
begins when the service gives it to gRPC, so it is a little more than that from the gateway on; it
ends when the frame that shows it has been painted.
"""

import argparse
import time
from statistics import median
from typing import Any

from benchmarks.page.trace import CATEGORIES, main_thread_tasks
from serving.gateway.page.files import read_page
from tests.support.browser import running_browser
from tests.support.fakes import KEY, running_stack
from tests.support.writing import Writer

_FIRST_TOKENS = 20
_PARAGRAPH = "The river *runs* past the old mill, and the `miller` counts each sack of corn again. "
_MARKDOWN = f"""## A chapter

{_PARAGRAPH * 3}

- {_PARAGRAPH}
- **Second**: {_PARAGRAPH}

```python
def total(sacks: list[int]) -> int:
    return sum(sacks)
```

| day | sacks |
|---|---|
| Monday | 12 |
| Tuesday | 9 |

"""
_WATCH = """() => {
  window.seen = new Promise((resolve) => {
    const watch = new MutationObserver(() => {
      const body = [...document.querySelectorAll(".assistant .body")].at(-1);
      if (!body?.textContent) return;
      watch.disconnect();
      // After the next frame has been painted comes a task.
      requestAnimationFrame(() => {
        const channel = new MessageChannel();
        channel.port1.onmessage = () => resolve(performance.timeOrigin + performance.now());
        channel.port2.postMessage("");
      });
    });
    watch.observe(document.getElementById("messages"), {childList: true, subtree: true, characterData: true});
  });
}"""  # noqa: E501


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=200.0, help="tokens per second")
    given = parser.parse_args()
    size = sum(len(file.content) for file in read_page().values())
    print(f"page: {size:,} bytes in {len(read_page())} files, not compressed")
    writer = Writer()
    with running_stack(inference=writer) as stack, running_browser() as browser:
        delays = sorted(_first_token(browser, stack.url, writer) for _ in range(_FIRST_TOKENS))
        print(
            f"first token: seen {median(delays):.1f} ms after the service sent it (median of "
            f"{len(delays)}; longest {delays[-1]:.1f})"
        )
        print(f"{given.tokens} tokens at {given.rate:g} a second; milliseconds:")
        print("answer       longest task  its processor time  most processor time  tasks over 50")
        for name, text, shows_tokens in (
            ("Markdown", _MARKDOWN, False),
            ("a paragraph", _PARAGRAPH, False),
            ("as tokens", _MARKDOWN, True),
        ):
            words = [f"{word} " for word in text.replace("\n", " \n ").split(" ") if word]
            pieces = [word.strip(" ") if "\n" in word else word for word in words]
            writer.service.pieces = (pieces * (given.tokens // len(pieces) + 1))[: given.tokens]
            writer.service.pause = 1 / given.rate
            tasks = main_thread_tasks(_traced(browser, stack.url, shows_tokens))
            print(
                f"{name:12} {tasks[0].wall:12.1f} {tasks[0].processor:19.1f} "
                f"{max(task.processor for task in tasks):20.1f} "
                f"{sum(task.wall > 50 for task in tasks):14}"
            )


def _opened(browser: Any, url: str) -> Any:
    page = browser.new_page()
    page.goto(url)
    with page.expect_response("**/v1/models"):
        page.fill("#key", KEY)
        page.dispatch_event("#key", "change")
    page.fill("#prompt", "Go on.")
    return page


def _first_token(browser: Any, url: str, writer: Writer) -> float:
    """Returns milliseconds from the service to the screen."""
    writer.service.pieces, writer.service.pause = ["one", " two"], 0.2
    page = _opened(browser, url)
    page.evaluate(_WATCH)
    page.press("#prompt", "Enter")
    seen = float(page.evaluate("() => window.seen"))
    page.close()
    return seen - 1000 * writer.service.sent[0]


def _traced(browser: Any, url: str, shows_tokens: bool) -> bytes:
    """Returns the trace of an answer from its question to its end."""
    page = _opened(browser, url)
    page.set_checked("#shown", shows_tokens)
    time.sleep(0.5)
    browser.start_tracing(page=page, categories=CATEGORIES)
    page.press("#prompt", "Enter")
    page.wait_for_selector("article:last-child .buttons button:text-is('Regenerate')", timeout=0)
    time.sleep(0.2)
    trace: bytes = browser.stop_tracing()
    page.close()
    return trace


if __name__ == "__main__":
    main()
