"""What a check has found: how it is, in a sentence, and what to mend."""

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"  # it works, but somebody should look
    FAULT = "fault"  # something does not work, or will not


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str  # what was looked at
    outcome: Outcome
    sentence: str  # how it is
    mend: str = ""  # what to do about it; empty if nothing is wrong, or the sentence says so


def ok(check: str, sentence: str) -> Finding:
    """Return that all is well."""
    return Finding(check=check, outcome=Outcome.OK, sentence=sentence)


def warning(check: str, sentence: str, mend: str = "") -> Finding:
    """Return that somebody should look."""
    return Finding(check=check, outcome=Outcome.WARNING, sentence=sentence, mend=mend)


def fault(check: str, sentence: str, mend: str = "") -> Finding:
    """Return that something does not work."""
    return Finding(check=check, outcome=Outcome.FAULT, sentence=sentence, mend=mend)
