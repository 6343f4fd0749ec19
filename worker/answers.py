"""Turn what a trainer gave, or how it failed, into what may be told to the coordinator."""

import math
import traceback
from collections.abc import Mapping
from pathlib import Path

from common.errors import InvalidInput
from common.messages import MAX_METRIC_CHARACTERS, MAX_METRICS, PartDeclined
from worker.jobs import Part

REASON_CHARACTERS = 2000  # what PartDeclined takes


def decline(part: Part, reason: str, *, failed: bool) -> PartDeclined:
    """Return the answer that says why the part is not done."""
    return PartDeclined(
        job_id=part.job_id,
        job_name=part.job_name,
        task_id=part.task_id,
        attempt=part.attempt,
        failed=failed,
        reason=reason[:REASON_CHARACTERS],
    )


def sendable(text: str) -> str:
    """Return the text without halves of characters, which a trainer's words may have and nothing can send."""
    return text.encode("utf-8", "replace").decode()


def locate(error: BaseException) -> str:
    """Say what went wrong and where, but not with which values: an exception's own words may quote the site's data."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "-packages" not in frame.filename] or frames
    return (
        f"{type(error).__name__}: in {own[-1].name}, {Path(own[-1].filename).name} line {own[-1].lineno}; "
        "the site's own log has the details."
    )


def count_examples(num_examples: object) -> int:
    """Return the number as a message holds it; raise InvalidInput for what is none."""
    try:
        count = int(num_examples)  # type: ignore[call-overload]  # whatever the trainer gave: numpy integers are welcome
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInput("The trainer's num_examples is not a number; correct the trainer.") from error
    if not 0 <= count < 2**63:  # what a message holds
        raise InvalidInput(f"The trainer's num_examples is {count}; correct the trainer.")
    return int(count)


def clean_metrics(metrics: Mapping[str, object]) -> dict[str, float | None]:
    """Return the metrics as plain numbers, None for one that is not finite; raise InvalidInput for what is none."""
    cleaned: dict[str, float | None] = {}
    if len(metrics) > MAX_METRICS:
        raise InvalidInput(f"The trainer gives {len(metrics)} metrics; correct it to give {MAX_METRICS} at most.")
    for name, value in metrics.items():
        if len(str(name)) > MAX_METRIC_CHARACTERS:
            raise InvalidInput(
                f"The trainer's metric {str(name)[:80]!r}… has a name of {len(str(name))} characters; correct the "
                f"trainer to use {MAX_METRIC_CHARACTERS} at most."
            )
        try:
            number = float(value)  # type: ignore[arg-type]  # whatever the trainer gave: numpy and torch scalars are welcome
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidInput(
                f"The trainer's metric {str(name)[:80]!r} is not a number; correct the trainer."
            ) from error
        cleaned[str(name)] = number if math.isfinite(number) else None
    return cleaned
