"""The command `doctor`."""

from collections import Counter
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from common.errors import InvalidInput, Unavailable
from common.settings import Settings
from coordinator.checks.finding import Finding, Outcome
from coordinator.cli.output import console, default_settings_file, json_option, print_json
from coordinator.doctor import examine, is_well
from coordinator.stack.folder import StackFolder

_MARKS = {
    Outcome.OK: Text("✔ ok", style="green"),
    Outcome.WARNING: Text("! warning", style="yellow"),
    Outcome.FAULT: Text("✘ fault", style="bold red"),
}


@click.command(
    epilog="""\b
Example:
  fedchord doctor
  fedchord --config coordinator.toml doctor --json"""
)
@json_option
@click.pass_obj
def doctor(config: Path | None, as_json: bool) -> None:
    """Check all that the coordinator needs, and say what to mend.

    Looks at the broker, the object store, the database, the signing key, versions, clocks, disks, every enrolled site,
    and the embedded stack if there is one. Nothing is changed, but for one small blob that is written and deleted. The
    exit code is 0 if there is no fault, else 5.
    """
    file = config or default_settings_file()
    settings = Settings.load(file)
    findings = examine(settings, _stack_folder(file))
    if as_json:
        print_json({"well": is_well(findings), "findings": findings})
    else:
        _print(findings)
        if file is None and not settings.model_fields_set:
            click.echo(
                "There is no stack in this folder, no settings file was named with --config and no variable FEDCHORD_… "
                "is set: what was looked at are the defaults."
            )
    if not is_well(findings):
        raise click.exceptions.Exit(Unavailable.exit_code)


def _stack_folder(settings_file: Path | None) -> Path | None:
    """Return the folder of the stack that the settings are of; None if they are of none."""
    if settings_file is None:
        return None
    folder = settings_file.absolute().parent
    try:
        return folder if StackFolder(folder).record.exists() else None
    except InvalidInput:  # a stack cannot be in a folder of that name
        return None


def _print(findings: tuple[Finding, ...]) -> None:
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("CHECK", no_wrap=True)
    made.add_column("")
    made.add_column("FOUND", overflow="fold")
    for finding in findings:
        found = Text(finding.sentence)
        if finding.mend:
            found.append(f"\nTo mend: {finding.mend}", style="bold")
        made.add_row(Text(finding.check), _MARKS[finding.outcome], found)
    console().print(made)
    counts = Counter(finding.outcome for finding in findings)
    click.echo(f"\n{counts[Outcome.OK]} ok, {counts[Outcome.WARNING]} warnings, {counts[Outcome.FAULT]} faults.")
