"""Markdown in the browser: what becomes of it, also piece by piece, and what never can."""

from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.support.fakes import Stack

RENDER = """async ([pieces, isEnded]) => {
  const { Markdown } = await import("/page/markdown.js");
  const place = document.createElement("div");
  document.body.append(place);
  const markdown = new Markdown(place);
  for (const piece of pieces) markdown.append(piece);
  if (isEnded) markdown.end();
  for (const made of place.querySelectorAll("figcaption, [tabindex]")) {
    if (made.tagName === "FIGCAPTION") made.replaceWith(`[${made.firstChild.textContent}]`);
    else made.removeAttribute("tabindex");
  }
  const html = place.innerHTML;
  place.remove();
  return [html, markdown.rendered];
}"""
LINK = 'target="_blank" rel="noopener noreferrer nofollow"'
CASES = [
    ("plain", "<p>plain</p>"),
    ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    ("# One\n### Deep", "<h3>One</h3><h4>Deep</h4>"),
    ("#hash and 1.5 and -3", "<p>#hash and 1.5 and -3</p>"),
    (
        "**b** *i* __B__ _I_ ~~no~~",
        "<p><strong>b</strong> <em>i</em> <strong>B</strong> <em>I</em> <del>no</del></p>",
    ),
    ("***both***", "<p><strong><em>both</em></strong></p>"),
    ("2 * 3 * 4, snake_case_name, a ** b", "<p>2 * 3 * 4, snake_case_name, a ** b</p>"),
    ("`a *b* <i>` and ``x ` y``", "<p><code>a *b* &lt;i&gt;</code> and <code>x ` y</code></p>"),
    (r"\*no\* \\ \d", r"<p>*no* \ \d</p>"),
    ("open ` and ** and [x](", "<p>open ` and ** and [x](</p>"),
    ("---\n***", "<hr><hr>"),
    (
        "- a\n- b\n  - c\n- d",
        "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul></li><li><p>d</p></li></ul>",
    ),
    ("3. a\n4. b\n\nend", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol><p>end</p>'),
    ("1. a\n\n   more\n2. b", '<ol start="1"><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>'),
    ("> a\n> b\n\nc", "<blockquote><p>a\nb</p></blockquote><p>c</p>"),
    (
        "```py\nx = 1\n\n# y\n```\nend",
        '<figure class="code">[py]<pre><code>x = 1\n\n# y\n</code></pre></figure><p>end</p>',
    ),
    (
        "```\n<script>\n",
        '<figure class="code">[text]<pre><code>&lt;script&gt;\n</code></pre></figure>',
    ),
    (
        "- a\n  ```\n  - x\n  ```\n- b",
        '<ul><li><p>a</p><figure class="code">[text]<pre><code>- x\n</code></pre>'
        "</figure></li><li><p>b</p></li></ul>",
    ),
    (
        "| a | b |\n|---|:-:|\n| 1 | 2 \\| 3 |",
        '<div class="table"><table><thead><tr><th scope="col">a</th><th scope="col">b'
        "</th></tr></thead><tbody><tr><td>1</td><td>2 | 3</td></tr></tbody></table>"
        "</div>",
    ),
    (
        "[t](https://a.b/c_d) https://a.b/x.",
        f'<p><a href="https://a.b/c_d" {LINK}>t</a> '
        f'<a href="https://a.b/x" {LINK}>https://a.b/x</a>.</p>',
    ),
    ("<https://a.b> h", f'<p><a href="https://a.b/" {LINK}>https://a.b</a> h</p>'),
    ("![alt](https://a.b/p.png)", f'<p><a href="https://a.b/p.png" {LINK}>alt (picture)</a></p>'),
    ("<b>bold</b> &amp;", "<p>&lt;b&gt;bold&lt;/b&gt; &amp;amp;</p>"),
]
SAMPLE = "\n\n".join(text for text, _ in CASES if "```\n<script" not in text)
# Texts that would run, load or disguise something if they were read as markup.
ATTACKS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg/onload=window.hacked=1>",
    "<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "[x](javascript:window.hacked=1)",
    "[x](JaVaScRiPt&colon;window.hacked=1)",
    "[x](java\tscript:window.hacked=1)",
    "[x](data:text/html,<script>window.hacked=1</script>)",
    "[x](vbscript:x) [y](//evil.example) [z](/docs) <javascript:window.hacked=1>",
    "![x](javascript:window.hacked=1) ![x](https://evil.example/pixel.png)",
    '[x](https://a.b/"onmouseover="window.hacked=1)',
    "[x](https://a.b/' onclick='window.hacked=1)",
    '```"><img src=x onerror=window.hacked=1>\ncode\n```',
    "```js onclick=window.hacked=1\ncode\n```",
    "| <img src=x onerror=window.hacked=1> | b |\n|---|---|\n"
    "| </td><script>window.hacked=1</script> | 2 |",
    "# <base href=//evil.example>\n<style>*{display:none}</style>"
    "<meta http-equiv=refresh content=0>",
    "<form action=//evil.example><input name=key><button>Send</button></form>",
    "[__proto__](https://a.b) {{constructor.constructor('window.hacked=1')()}}",
    "\u202egnp.exe\u202c \x00 \ud83d",
]
ALLOWED = {
    "a",
    "blockquote",
    "br",
    "button",
    "code",
    "del",
    "div",
    "em",
    "figcaption",
    "figure",
} | {
    *("h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "span", "strong", "ul"),
    *("table", "tbody", "td", "th", "thead", "tr"),
}


@pytest.fixture(scope="module")
def page(browser: Any, shared: Stack) -> Iterator[Any]:
    page = browser.new_page()
    page.goto(shared.url)
    yield page
    page.close()


def rendered(page: Any, *pieces: str, is_ended: bool = True) -> str:
    html, _ = page.evaluate(RENDER, [list(pieces), is_ended])
    return str(html)


@pytest.mark.parametrize(("text", "html"), CASES)
def test_a_text_becomes_elements(text: str, html: str, page: Any) -> None:
    assert rendered(page, text) == html
    if not text.startswith("```\n<"):
        assert rendered(page, *text) == html  # a character at a time


@pytest.mark.parametrize("size", [2, 7, 64])
def test_a_text_in_pieces_becomes_the_same(size: int, page: Any) -> None:
    pieces = [SAMPLE[i : i + size] for i in range(0, len(SAMPLE), size)]
    assert rendered(page, *pieces) == rendered(page, SAMPLE)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one **two", "<p>one **two</p>"),
        ("one\n\n# T", "<p>one</p><h3>T</h3>"),
        ("- a\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("```py\nx = ", '<figure class="code">[py]<pre><code>x = </code></pre></figure>'),
        ("```py\nx = 1\n``", '<figure class="code">[py]<pre><code>x = 1\n</code></pre></figure>'),
        ("text\n```", "<p>text</p>"),
    ],
)
def test_what_has_come_is_shown_before_its_line_ends(text: str, html: str, page: Any) -> None:
    assert rendered(page, *text, is_ended=False) == html


class _Reader(HTMLParser):
    """Python's own reader of HTML, which notes what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes.extend((name, value or "") for name, value in attrs)


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_becomes_markup(attack: str, page: Any) -> None:
    for pieces in ([attack], list(attack)):
        html, _ = page.evaluate(RENDER, [pieces, True])
        reader = _Reader()
        reader.feed(html)
        assert set(reader.names) <= ALLOWED
        assert {name for name, _ in reader.attributes} <= {
            "href",
            "target",
            "rel",
            "class",
            "scope",
            "start",
            "type",
        }
        for name, value in reader.attributes:
            assert name != "href" or value.startswith(("https://", "http://", "mailto:"))
    assert page.evaluate("window.hacked === undefined")


WORDS = "lorem ipsum **dolor** sit _amet_ `x` " * 1600  # 60,000 characters
LONG = {
    "one line": WORDS,
    "a paragraph": WORDS.replace("amet_ ", "amet_\n"),
    "an item": f"- {WORDS}",
    "items": WORDS.replace("lorem", "\n- lorem"),
    "a quotation": "> " + WORDS.replace("amet_ ", "amet_\n> "),
    "code": "```\n" + WORDS.replace("amet_ ", "amet_\n"),
    "a line of code": f"```\n{WORDS}",
    "a table": "| a | b |\n|---|---|\n" + "| lorem ipsum | dolor |\n" * 2600,
    "stars": "*" * 60_000,
    "brackets": "[" * 30_000 + "![" * 15_000,
    "ticks": "` `` ``` " * 6_000,
    "stars that end nothing": "*a **b " * 8_000,
    "quotations in quotations": "> " * 30_000,
    "items in items": "- " * 30_000,
    "addresses": "https://" * 7_500,
    "underscores": "_a _" * 15_000,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_the_work_grows_with_the_text_alone(text: str, page: Any) -> None:
    """A block of up to 3,000 characters is rendered anew for each piece, and no longer one."""
    pieces = [text[i : i + 100] for i in range(0, len(text), 100)]
    _, characters = page.evaluate(RENDER, [pieces, True])
    assert characters <= 8 * len(text) + 3000 * 30 * 3
