"""Log lines: what others wrote cannot pass for a line of ours."""

import logging

from common.logs import TextFormatter


def test_a_site_s_words_stay_on_their_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "Site %s said: %s", ("a", "no\n2026 INFO\x1b[2J é"), None)
    line = TextFormatter().format(record)
    assert line.endswith("INFO Site a said: no\\n2026 INFO\\x1b[2J é")


def test_an_exception_keeps_its_lines() -> None:
    try:
        raise ValueError("wrong")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "It failed.", (), info)
    lines = TextFormatter().format(record).splitlines()
    assert lines[0].endswith("It failed.")
    assert "ValueError: wrong" in lines[-1]
