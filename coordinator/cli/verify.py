"""The command `verify`."""

from pathlib import Path

import click

from common.errors import FedChordError, NotFound
from coordinator.cli.output import json_option, open_coordinator, print_json, size_text
from coordinator.verifying import Result, Verdict
from coordinator.verifying import verify as verify_models

_EXIT_CODES = {
    Result.SAME: 0,
    Result.INTACT: 0,
    Result.DIFFERENT: FedChordError.exit_code,
    Result.MISSING: NotFound.exit_code,
    Result.EXPIRED: NotFound.exit_code,
}
_MARKS = {
    Result.SAME: ("✔", "green"),
    Result.INTACT: ("✔", "green"),
    Result.DIFFERENT: ("✘", "red"),
    Result.MISSING: ("?", "yellow"),
    Result.EXPIRED: ("?", "yellow"),
}


@click.command(
    epilog="""\b
Example:
  fedchord verify 0c2b
  fedchord verify 0c2b --all --json

\b
Exit codes:
  0  the same to the bit, or intact where there is nothing to recompute
  1  not the same
  3  something that is needed was deleted, or has expired"""
)
@click.argument("model_id")
@click.option("--all", "whole_chain", is_flag=True, help="Also verify every global model that this one goes on from.")
@json_option
@click.pass_obj
def verify(config: Path | None, model_id: str, whole_chain: bool, as_json: bool) -> None:
    """Recompute a global model from its updates, and compare.

    Every blob that is read is hashed first. Of an update or a first model only the blobs are hashed: there is nothing
    to recompute. MODEL_ID may be shortened to what is unique.
    """
    verdicts = []
    with open_coordinator(config, needs_broker=False) as services:
        for verdict in verify_models(services, model_id, whole_chain=whole_chain):
            verdicts.append(verdict)
            if not as_json:
                _print(verdict)
    results = {verdict.result for verdict in verdicts}
    worst = next(result for result in (Result.DIFFERENT, Result.MISSING, Result.EXPIRED, *Result) if result in results)
    if as_json:
        print_json({"result": worst, "models": verdicts})
    if code := _EXIT_CODES[worst]:
        raise click.exceptions.Exit(code)


def _print(verdict: Verdict) -> None:
    mark, colour = _MARKS[verdict.result]
    click.echo(f"{click.style(mark, fg=colour)} {verdict.title}: {verdict.sentence}")
    for trouble in verdict.troubles:
        click.echo(f"    {trouble}")
    if verdict.blobs:
        click.echo(f"    {verdict.blobs} blobs hashed, {size_text(verdict.bytes)}.")
