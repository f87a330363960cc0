"""Log lines: JSON, constant events, declared fields, and no text of anybody else."""

import io
import json
import traceback
from typing import Any

import pytest

from sidecar.telemetry.logging import FIELDS, Level, Log


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_time_level_process_event_and_its_fields() -> None:
    """One JSON object a line, flushed as it is written."""
    stream = io.StringIO()
    Log(process="gateway", stream=stream, now=lambda: 1.5).info("ready", version="1.2", count=3)

    assert lines(stream) == [
        {
            "ts": "1970-01-01T00:00:01.500Z",
            "level": "info",
            "process": "gateway",
            "event": "ready",
            "version": "1.2",
            "count": 3,
        }
    ]
    assert stream.getvalue().endswith("}\n")


@pytest.mark.parametrize("name", ["message", "token", "iban", "owner", "body", "text", "pin", "url", "Code"])
def test_an_undeclared_field_is_a_defect_at_every_level(name: str) -> None:
    """Also at a level that is not written, so that no test run can miss it."""
    for level in Level:
        log = Log(process="gateway", level=Level.ERROR, stream=io.StringIO())
        with pytest.raises(ValueError, match=name):
            getattr(log, level.name.lower())("event", **{name: "x"})
    assert name not in FIELDS


def test_bi_f20_a_lower_level_adds_lines_and_no_fields() -> None:
    """F20: what debug writes of an event is what info writes of it."""
    written = {}
    for level in (Level.DEBUG, Level.INFO):
        stream = io.StringIO()
        log = Log(process="gateway", level=level, stream=stream, now=lambda: 0)
        log.debug("detail", count=1)
        log.info("ready", version="1")
        written[level] = lines(stream)

    assert written[Level.DEBUG][1:] == written[Level.INFO]
    assert [line["event"] for line in written[Level.DEBUG]] == ["detail", "ready"]


@pytest.mark.parametrize("level", list(Level))
def test_only_lines_of_the_level_and_above_are_written(level: Level) -> None:
    """Four levels."""
    stream = io.StringIO()
    log = Log(process="gateway", level=level, stream=stream)
    for one in Level:
        getattr(log, one.name.lower())("event")

    assert [line["level"] for line in lines(stream)] == [one.name.lower() for one in Level if one >= level]


def test_an_exception_shows_its_class_and_place_and_never_its_text() -> None:
    """Neither its own text nor that of its cause, its notes or the values around it."""
    stream = io.StringIO()
    secret = "hunter2"

    def fail() -> None:
        try:
            raise KeyError(secret)
        except KeyError as cause:
            error = RuntimeError(f"token {secret}")
            error.add_note(secret)
            raise error from cause

    with pytest.raises(RuntimeError) as raised:
        fail()
    Log(process="egress", stream=stream).exception("failed", raised.value, work="reconcile")

    (line,) = lines(stream)
    assert secret in "".join(traceback.format_exception(raised.value))
    assert (line["level"], line["error_class"], line["work"]) == ("error", "RuntimeError", "reconcile")
    assert str(line["error_place"]).startswith("fail:")
    assert secret not in stream.getvalue()


def test_an_exception_that_was_never_raised_has_no_place() -> None:
    """And is still a line."""
    stream = io.StringIO()
    Log(process="gateway", stream=stream).exception("failed", ValueError("x"))

    assert lines(stream)[0]["error_place"] == ""


@pytest.mark.parametrize("value", ["a\nb", 'a"b', "a\x1b[31mb", "a\u2028b", "\ud800", "ä"])
def test_a_value_cannot_break_out_of_its_line(value: str) -> None:
    """Line ends, quotes, terminal escapes, halves of characters: escaped, and the same again when read."""
    stream = io.StringIO()
    Log(process="gateway", stream=stream).info("event", reason=value)

    assert len(stream.getvalue().splitlines()) == 1
    assert stream.getvalue().isascii()
    assert lines(stream)[0]["reason"] == value
