"""The command `demo`."""

from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.tree import Tree

from common.errors import FedChordError
from coordinator.cli.following import follow
from coordinator.cli.output import console, json_option, print_json, table
from coordinator.demo.demonstration import (
    DEFAULT_ALPHA,
    DEFAULT_SEED,
    DEFAULT_SITES,
    Audience,
    DemoPlan,
    demonstrate,
)
from coordinator.demo.edges import Share
from coordinator.demo.results import Summary, shortcomings

_SITES_PER_EDGE = 2


@click.command(
    epilog="""\b
Example:
  fedchord demo
  fedchord demo --sites 3 --rounds 5 --output small-demo
  fedchord demo --edges 2"""
)
@click.option(
    "--sites", type=click.IntRange(1, 100), help=f"How many sites.  [default: {DEFAULT_SITES}, or two for each edge]"
)
@click.option(
    "--edges",
    type=click.IntRange(1, 20),
    help="Put edges between coordinator and sites, each a coordinator itself with its share of the sites.",
)
@click.option(
    "--rounds", type=click.IntRange(1, 1000), help="How many rounds.  [default: as in examples/digits/job.toml]"
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, min_open=True),
    default=DEFAULT_ALPHA,
    show_default=True,
    help="How alike the sites' data is: below 1 each site has its own mix of digits, at 100 all have the same.",
)
@click.option("--seed", type=click.IntRange(0), default=DEFAULT_SEED, show_default=True, help="Of split and training.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-output"),
    show_default=True,
    help="The folder for summary.json, metrics.csv, accuracy.png and model.safetensors.",
)
@json_option
def demo(
    sites: int | None, edges: int | None, rounds: int | None, alpha: float, seed: int, output: Path, as_json: bool
) -> None:
    """Train on handwritten digits at ten sites, start to end.

    Starts an embedded stack of real processes in a temporary folder, splits scikit-learn's handwritten digits over its
    sites, trains a torch network on them, compares it with centralized and with local-only training on held-out digits,
    and stops everything. In its default size it fails unless the federated model is nearly as good as the centralized.
    With --edges the federation has two levels, and it is shown who trained what.
    """
    plan = DemoPlan(
        num_sites=sites or _SITES_PER_EDGE * (edges or 0) or DEFAULT_SITES,
        num_edges=edges or 0,
        rounds=rounds,
        alpha=alpha,
        seed=seed,
        output=output,
    )
    summary = demonstrate(plan, _audience(None if as_json else console()))
    if as_json:
        print_json(asdict(summary))
    else:
        _show(summary, output)
    if plan.is_default_size and (found := shortcomings(summary)):
        raise FedChordError(f"The demonstration is not as good as it should be: {'; '.join(found)}.")


def _audience(out: Console | None) -> Audience:
    def say(step: str) -> None:
        if out is not None:
            out.print(step, markup=False)

    return Audience(say=say, follow=lambda services, job_id: follow(services, job_id, out))


def _show(summary: Summary, output: Path) -> None:
    if summary.shares:
        console().print(_tree(summary))
    places = f"{summary.sites} sites" + (f" of {summary.edges} edges" if summary.edges else "")
    rows = [
        ("federated", f"{summary.federated_accuracy:.3f}", f"{places}, {summary.rounds} rounds"),
        ("centralized", f"{summary.centralized_accuracy:.3f}", "all digits in one place"),
        ("local only", f"{summary.local_only_accuracy_mean:.3f}", "each site alone, mean"),
    ]
    console().print(table(["TRAINING", "ACCURACY", "ON THE HELD-OUT DIGITS"], rows, empty=""))
    click.echo(
        f"{summary.seconds_total:.1f} s in all, {summary.seconds_per_round_median:.2f} s a training round (median). "
        f"Results: {output}/"
    )


def _tree(summary: Summary) -> Tree:
    """Return who trained what, and how good the final model is at each place."""
    tree = Tree(f"centre: {summary.federated_accuracy:.3f} on the held-out digits")
    for edge in summary.shares:
        branch = tree.add(_share(edge))
        for site in edge.sites:
            branch.add(_share(site))
    return tree


def _share(share: Share) -> str:
    accuracy = "not tested" if share.accuracy is None else f"{share.accuracy:.3f} on its own test digits"
    return f"{share.name}: trained on {share.num_examples} digits, {accuracy}"
