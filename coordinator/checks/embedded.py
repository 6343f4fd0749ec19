"""Look at the embedded stack, if there is one."""

from collections.abc import Iterator
from pathlib import Path

from coordinator.checks.finding import Finding, fault, ok
from coordinator.stack import lifecycle


def check_stack(folder: Path) -> Iterator[Finding]:
    """Look at the processes of the stack in the folder."""
    name = "stack"
    status = lifecycle.status(folder)
    if not status.is_running:
        left = f" and has left {status.leftovers} processes" if status.leftovers else ""
        start = "`fedchord down` ends them; `fedchord up` starts it again." if left else "`fedchord up` starts it."
        yield fault(name, f"The stack in {status.folder} does not run{left}.", start)
        return
    if bad := [
        f"{process.name} is {process.state.lower()}" for process in status.processes if process.state != "RUNNING"
    ]:
        yield fault(name, f"In {status.folder}: {', '.join(bad)}.", f"Read the logs in {status.folder / 'logs'}.")
    elif status.sites_missing:
        names = ", ".join(status.sites_missing)
        yield fault(name, f"No heartbeat from {names}.", f"Read the logs in {status.folder / 'logs'}.")
    else:
        yield ok(name, f"All {len(status.processes)} processes of {status.folder} run.")
