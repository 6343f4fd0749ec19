"""Log lines: what others wrote cannot pass for a line of ours."""

import logging

from common.logs import TextFormatter


def test_a_site_s_words_stay_on_their_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "Site %s said: %s", ("a", "no\n2026 INFO\x1b[2J é"), None)
    line = TextFormatter().format(record)
    assert line.endswith("INFO Site a said: no\\n2026 INFO\\x1b[2J é")


def test_a_field_stays_on_its_line_too() -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "It said something.", (), None)
    record.site = "a\n2026 INFO\x1b[2J"
    assert TextFormatter().format(record).endswith("It said something.  [site=a\\n2026 INFO\\x1b[2J]")


def test_the_coloured_copies_of_a_sentence_are_left_out() -> None:
    record = logging.LogRecord("uvicorn.error", logging.INFO, "x.py", 1, "Started [%d]", (7,), None)
    record.color_message = "Started [\x1b[36m%d\x1b[0m]"
    assert TextFormatter().format(record).endswith("INFO Started [7]")


def test_an_exception_keeps_its_lines() -> None:
    try:
        raise ValueError("wrong")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "It failed.", (), info)
    lines = TextFormatter().format(record).splitlines()
    assert lines[0].endswith("It failed.")
    assert "ValueError: wrong" in lines[-1]
