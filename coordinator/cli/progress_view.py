"""Draw a job's progress: for a terminal one picture that changes, for a pipe one line a round."""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.heartbeats import Heartbeat
from coordinator.cli.output import metrics_text
from coordinator.jobs import LIVE
from coordinator.parts import Part
from coordinator.progress import JobProgress
from coordinator.rounds import Round
from coordinator.states import PartState, RoundKind, RoundState

MAIN_METRIC = "accuracy"

_SPARKS = "▁▂▃▄▅▆▇█"
_SPARKLINE_ROUNDS = 40
_MOST_SITES = 30  # rows that fit a terminal
_STYLES = {
    PartState.WAITING: "yellow",
    PartState.ACCEPTED: "green",
    PartState.QUARANTINED: "red",
    PartState.DECLINED: "magenta",
    PartState.FAILED: "red",
    PartState.DROPPED: "red",
    PartState.LATE: "yellow",
    PartState.KEPT: "green",
}


def draw(progress: JobProgress, heartbeats: Mapping[str, Heartbeat]) -> RenderableType:
    """Return the picture: how many rounds are done, how good the model is, what every site does."""
    job = progress.job
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(job.name, style="bold"),
        ProgressBar(total=job.spec.rounds, completed=progress.rounds_done, width=40),
        f"{progress.rounds_done}/{job.spec.rounds} rounds",
        Text(str(job.state), style="cyan"),
    )
    return Group(head, *_facts(progress), _sites(progress, heartbeats))


def line(round_: Round) -> str:
    """Return what came of a round that has ended, in one line."""
    words = [round_.title.removeprefix("the ") + f" {round_.state}"]
    if round_.closed_at is not None:
        words.append(f"{(round_.closed_at - round_.created_at).total_seconds():.2f} s")
    if round_.metrics:
        words.append(metrics_text(round_.metrics))
    if round_.reason:
        words.append(round_.reason)
    return ", ".join(words)


def sparkline(values: Sequence[float]) -> str:
    """Return the values as a row of bars, the lowest to the highest of them."""
    shown = values[-_SPARKLINE_ROUNDS:]
    if not shown:
        return ""
    low, span = min(shown), max(shown) - min(shown)
    return "".join(_SPARKS[round((value - low) / span * (len(_SPARKS) - 1)) if span else 0] for value in shown)


def main_metric(progress: JobProgress) -> str | None:
    """Return the metric to show: accuracy if it is measured, else the first of those that are."""
    names = {
        name
        for round_ in progress.rounds
        if round_.kind is RoundKind.TEST and round_.state is RoundState.CLOSED
        for name in round_.metrics
    }
    return MAIN_METRIC if MAIN_METRIC in names else min(names, default=None)


def _facts(progress: JobProgress) -> list[RenderableType]:
    facts: list[RenderableType] = []
    name = main_metric(progress)
    if name is not None:
        values = [value for _, value in progress.metric(name)]
        facts.append(Text(f"{name} {values[-1]:.4f}  {sparkline(values)}"))
    if seconds := progress.round_seconds():
        facts.append(Text(f"last round {seconds[-1]:.2f} s", style="dim"))
    return facts


def _sites(progress: JobProgress, heartbeats: Mapping[str, Heartbeat]) -> RenderableType:
    round_ = progress.newest
    made = Table(box=None, pad_edge=False, header_style="bold")
    is_live = progress.job.state in LIVE
    for column in ("SITE", round_.title.removeprefix("the ").upper() if round_ else "PART", "NOW" if is_live else ""):
        made.add_column(column, no_wrap=True)
    parts = {part.site: part for part in progress.parts}
    sites = sorted({*progress.job.sites, *parts}, key=lambda site: (len(site), site))
    for site in sites[:_MOST_SITES]:
        made.add_row(site, _part(parts.get(site)), _activity(heartbeats.get(site)) if is_live else "")
    if len(sites) > _MOST_SITES:
        made.add_row(f"and {len(sites) - _MOST_SITES} more", "", "")
    return made


def _part(part: Part | None) -> Text:
    if part is None:
        return Text("-", style="dim")
    words = f"{part.state}: {part.reason}" if part.reason else str(part.state)
    return Text(words, style=_STYLES[part.state])


def _activity(heartbeat: Heartbeat | None) -> Text:
    if heartbeat is None:
        return Text("no heartbeat", style="red")
    return Text("; ".join(heartbeat.working_on) or "idle", style="dim" if not heartbeat.working_on else "")
