"""The files of the page to chat with, read once, and the headers that they are answered with.

The page is HTML, modules of JavaScript and a style, as they stand in this folder: nothing is built
and nothing comes from elsewhere. It uses the routes of OpenAI's clients as any client does. Text of
a model may hold anything, so the policy below (W3C's Content Security Policy 3) lets a browser run
and load nothing but these files, whatever a fault of the page may let through.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from fastapi import Request
from fastapi.responses import Response

INDEX = "index.html"
"""Name of the file that is answered at /."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Not even our own scripts may turn a text into markup.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # A browser keeps the file, and asks each time whether it is still the same.
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page."""

    content: bytes
    kind: str
    """The value of Content-Type."""
    tag: str
    """The value of ETag: the beginning of the content's SHA-256."""

    def answer(self, request: Request) -> Response:
        """Returns the file, or status 304 to a browser that has it."""
        headers = _HEADERS | {"etag": self.tag}
        known = request.headers.get("if-none-match", "")
        # A proxy that compresses answers makes the tag a weak one.
        if self.tag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.kind)


def read_page() -> Mapping[str, PageFile]:
    """Returns the files of the page by their names."""
    page = {}
    for entry in files(__package__).iterdir():
        kind = _TYPES.get(entry.name.rpartition(".")[2])
        if kind is not None:
            content = entry.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            page[entry.name] = PageFile(content, kind, tag)
    return page
