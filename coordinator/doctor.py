"""Examine everything that a coordinator needs, and say what to mend."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.settings import Settings
from coordinator.checks.broker import check_broker, check_queues
from coordinator.checks.choosers import check_choosers
from coordinator.checks.clocks import check_clocks
from coordinator.checks.database import check_database
from coordinator.checks.embedded import check_stack
from coordinator.checks.finding import Finding, Outcome
from coordinator.checks.limit import Check, run_checks
from coordinator.checks.machine import check_disks, check_key, check_versions
from coordinator.checks.object_store import check_object_store
from coordinator.checks.sites import check_sites

LIMIT_SECONDS = 15.0  # for each check; they run side by side


def examine(
    settings: Settings, stack_folder: Path | None, *, limit_seconds: float = LIMIT_SECONDS
) -> tuple[Finding, ...]:
    """Return what every check finds; the stack is looked at if there is a folder of one."""
    checks: dict[str, Check] = {
        "versions": partial(check_versions, settings),
        "signing key": partial(check_key, settings),
        "disks": partial(check_disks, settings),
        "choosers": partial(check_choosers, settings),
        "database": partial(check_database, settings),
        "object store": partial(check_object_store, settings),
        "broker": partial(check_broker, settings),
        "queues": partial(check_queues, settings),
        "clocks": partial(check_clocks, settings),
        "sites": partial(check_sites, settings),
    }
    if stack_folder is not None:
        checks["stack"] = partial(check_stack, stack_folder)
    return run_checks(checks, limit_seconds=limit_seconds)


def is_well(findings: Sequence[Finding]) -> bool:
    """Return whether there is no fault."""
    return all(finding.outcome is not Outcome.FAULT for finding in findings)
