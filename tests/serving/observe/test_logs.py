"""Lines of the log, as a program and as a person reads them."""

import io
import json
import logging
import subprocess
import sys

import pytest

from serving.observe.logs import FORMATS, JsonFormatter, TextFormatter, fields


def line(formatter: logging.Formatter, message: str, *arguments: object, **values: object) -> str:
    """What is written for one record."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(formatter)
    logger = logging.Logger("gateway.test")
    logger.addHandler(handler)
    try:
        raise KeyError("gone")
    except KeyError as error:
        failed = values.pop("failed", False)
        logger.info(message, *arguments, extra=fields(**values), exc_info=error if failed else None)
    return written.getvalue().removesuffix("\n")


def test_json_keeps_the_fields_apart() -> None:
    said = json.loads(line(JsonFormatter(), "%d requests", 3, status=200, caller="a b", none=None))
    assert said.pop("time").endswith("+00:00")
    assert said == {
        "level": "INFO",
        "logger": "gateway.test",
        "message": "3 requests",
        "status": 200,
        "caller": "a b",
    }


def test_a_traceback_is_one_line_of_json() -> None:
    text = line(JsonFormatter(), "failed", failed=True)
    assert "\n" not in text
    assert json.loads(text)["exception"].endswith("KeyError: 'gone'")


def test_text_ends_with_the_fields() -> None:
    said = line(TextFormatter(), "request", status=200, seconds=0.25, caller="me")
    assert said.endswith("INFO gateway.test: request status=200 seconds=0.25 caller=me")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("/chat/completions", "/chat/completions"),
        ("/x\n2026-01-01 ERROR all is lost", '"/x\\n2026-01-01 ERROR all is lost"'),
        ("a b", '"a b"'),
        ('a" status="500', '"a\\" status=\\"500"'),
        ("naïve", '"na\\u00efve"'),
        ("\x1b[31m", '"\\u001b[31m"'),
        (["a", 1], '["a", 1]'),
    ],
)
def test_no_value_breaks_a_line_or_stands_for_another(value: object, written: str) -> None:
    assert line(TextFormatter(), "request", path=value).endswith(f" request path={written}")


def test_the_formats_have_names() -> None:
    assert FORMATS == ("text", "json")


def test_the_format_is_ours_although_a_library_has_logged_before() -> None:
    """As libtpu does, when it is imported where no TPU is."""
    program = (
        "import logging; logging.warning('first')\n"
        "from serving.observe.logs import fields, set_up\n"
        "set_up('serving', 'json')\n"
        "logging.getLogger('serving.x').info('call', extra=fields(status=200))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    first, *rest = ran.stderr.splitlines()
    assert first == "WARNING:root:first"
    assert [json.loads(line)["status"] for line in rest] == [200]
