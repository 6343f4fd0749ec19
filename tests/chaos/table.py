"""What the suite found: faults, moments, outcomes and how often; collected while it runs, written at its end.

    python -m tests.chaos.table FOLDER     print the rows in the folder's files, and write docs/reliability.md

Each process of a test run appends to a file of its own. A row is recorded by the test that has just proven it, so what
is not recorded was not proven.
"""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.federation import ROOT

PAGE = ROOT / "docs" / "reliability.md"
SAME = "the job finished with the same model"

_BLOCK = re.compile(r"(<!-- generated: chaos -->\n).*?(<!-- end -->)", re.DOTALL)


def failed_at_once(reason: str) -> str:
    """Return the outcome of a job that could not go on, and said so."""
    return f"the job failed at once with a reason that says what to do: {reason}"


@dataclass(frozen=True, kw_only=True, order=True)
class Row:
    """What came of a fault at a moment."""

    fault: str
    moment: str
    outcome: str


class Table:
    """The rows of this process."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder  # None: nobody wants to keep them

    def record(self, fault: str, moment: str, outcome: str = SAME, *, runs: int = 1) -> None:
        """Note that the fault at the moment had the outcome, so many times."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**asdict(Row(fault=fault, moment=moment, outcome=outcome)), "runs": runs})
        with (self._folder / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(f"{line}\n")


def read_rows(folder: Path) -> dict[Row, int]:
    """Return the runs of each row, the rows in order."""
    runs: Counter[Row] = Counter()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            values = json.loads(line)
            runs[Row(**{name: values[name] for name in ("fault", "moment", "outcome")})] += values["runs"]
    return dict(sorted(runs.items()))


def markdown(rows: dict[Row, int]) -> str:
    """Return the table as Markdown."""
    lines = ["| fault | moment | outcome | runs |", "| --- | --- | --- | ---: |"]
    lines += [f"| {row.fault} | {row.moment} | {row.outcome} | {runs} |" for row, runs in rows.items()]
    counted = f"{sum(rows.values())} runs of {len(rows)} rows."
    return "\n".join([*lines, "", counted])


def write_page(rows: dict[Row, int], page: Path = PAGE) -> None:
    """Put the table into the page, whose other words are written by hand."""
    text = page.read_text("utf-8")
    page.write_text(_BLOCK.sub(lambda found: f"{found[1]}\n{markdown(rows)}\n\n{found[2]}", text), "utf-8")


def main() -> None:
    """Print what the folder holds, and write the page."""
    rows = read_rows(Path(sys.argv[1]))
    if not rows:
        sys.exit(f"{sys.argv[1]} holds no rows; run the suite with --chaos-table {sys.argv[1]} first.")
    print(markdown(rows))
    write_page(rows)


if __name__ == "__main__":
    main()
