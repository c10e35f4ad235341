"""An object store on this machine: enough of S3's and of Google's protocol for what we do."""

import http.server
import json
import re
import threading
import urllib.parse
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape


class ObjectStore:
    """Objects by bucket and key, and the requests that came. Without a signature it refuses."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.url = ""

    def upload(self, folder: Path, bucket: str, prefix: str) -> None:
        """Stores all files below a folder."""
        objects = self.buckets.setdefault(bucket, {})
        for file in folder.rglob("*"):
            if file.is_file():
                objects[f"{prefix}/{file.relative_to(folder)}"] = file.read_bytes()

    def environment(self) -> dict[str, str]:
        """Variables by which a process finds this store, with credentials for it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_EC2_METADATA_DISABLED": "true",
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "a-token",
        }


@contextmanager
def running_store() -> Iterator[ObjectStore]:
    """Serves an empty store on a port of 127.0.0.1."""
    store = ObjectStore()

    class Handler(_Handler):
        objects = store

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: ObjectStore

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        self.objects.requests.append(f"{self.command} {self.path}")
        if google := re.fullmatch(r"/storage/v1/b/([^/]+)/o(?:/(.*))?", url.path):
            self._google(google[1], urllib.parse.unquote(google[2] or ""), query)
        else:
            bucket, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
            self._amazon(bucket, key, query)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        bucket, _, key = urllib.parse.unquote(self.path).lstrip("/").partition("/")
        self._write(bucket, key, "AWS4-HMAC-SHA256" in self.headers.get("authorization", ""))

    def do_POST(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        match = re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", url.path)
        assert match is not None, self.path
        key = dict(urllib.parse.parse_qsl(url.query))["name"]
        self._write(match[1], key, self.headers["authorization"] == "Bearer a-token")

    def _write(self, bucket: str, key: str, is_allowed: bool) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        self.objects.requests.append(f"{self.command} {bucket}/{key}")
        if not is_allowed:
            self._answer(403, _xml("Error", Code="AccessDenied", Message="Access Denied"))
            return
        self.objects.buckets[bucket][key] = content
        facts = {"name": key, "bucket": bucket, "generation": "1", "size": str(len(content))}
        self._answer(200, json.dumps(facts).encode(), etag='"1"')

    def _google(self, bucket: str, key: str, query: dict[str, str]) -> None:
        if self.headers["authorization"] != "Bearer a-token":
            self._answer(401, b'{"error": {"code": 401}}')
        elif bucket not in self.objects.buckets:
            self._answer(404, b'{"error": {"code": 404, "message": "bucket does not exist"}}')
        elif key:
            self._object(bucket, key, b'{"error": {"code": 404}}')
        else:
            first, end = query.get("startOffset", ""), query.get("endOffset")
            names = self._names(bucket, query.get("prefix", ""))
            names = [name for name in names if first <= name and (not end or name < end)]
            items = [{"name": name, "size": "1", "generation": "1"} for name in names]
            self._answer(200, json.dumps({"items": items}).encode())

    def _amazon(self, bucket: str, key: str, query: dict[str, str]) -> None:
        if "AWS4-HMAC-SHA256" not in self.headers.get("authorization", ""):
            self._answer(403, _xml("Error", Code="AccessDenied", Message="Access Denied"))
        elif bucket not in self.objects.buckets:
            self._answer(404, _xml("Error", Code="NoSuchBucket", Message="no such bucket"))
        elif key:
            self._object(bucket, key, _xml("Error", Code="NoSuchKey", Message="no such key"))
        else:
            names = self._names(bucket, query.get("prefix", ""))
            rows = "".join(
                f"<Contents><Key>{escape(name)}</Key><Size>1</Size></Contents>" for name in names
            )
            text = f"<ListBucketResult><KeyCount>{len(names)}</KeyCount>{rows}</ListBucketResult>"
            self._answer(200, text.encode())

    def _names(self, bucket: str, prefix: str) -> list[str]:
        return sorted(name for name in self.objects.buckets[bucket] if name.startswith(prefix))

    def _object(self, bucket: str, key: str, missing: bytes) -> None:
        content = self.objects.buckets[bucket].get(key)
        if content is None:
            self._answer(404, missing)
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        tag = f'"{zlib.crc32(content)}"'
        if self.headers.get("if-none-match") == tag:
            self._answer(304, b"", etag=tag)
            return
        facts = {"etag": tag, "x-goog-generation": str(zlib.crc32(content))}
        if span is None:
            self._answer(200, content, **facts)
            return
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        facts["content-range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(206, content[first : last + 1], **facts)

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Keeps quiet."""


def _xml(root: str, **fields: str) -> bytes:
    inside = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    return f"<{root}>{inside}</{root}>".encode()
