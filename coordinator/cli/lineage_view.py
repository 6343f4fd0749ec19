"""Draw what a model was made from: a branch for each job, in it one for each round, and there the models it made.

A chain of rounds is as deep as the job is long, so the rounds stand one below the other, the newest first, and not one
in the other; what each model was made from, where that is not drawn right below it, is said by ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text
from rich.tree import Tree

from coordinator.cli.output import metrics_text

Row = Mapping[str, Any]  # one model of a lineage, as `get_lineage` lists it


def draw_lineage(rows: Sequence[Row]) -> Tree:
    """Return the tree of a lineage whose first row is the model in question."""
    tree = Tree(_label(rows[0], set()), guide_style="dim")
    for title, group in _grouped(rows, _origin).items():
        if [row["model_id"] for row in group] == [rows[0]["model_id"]] and rows[0]["job_id"] is None:
            tree.add(Text(title, style="bold"))  # the model itself stands above
            continue
        branch = tree.add(Text(title, style="bold"))
        if group[0]["job_id"] is None:
            for row in group:
                branch.add(_label(row, set()))
            continue
        rounds = _grouped(group, lambda row: row["round"])
        for number, members in sorted(rounds.items(), reverse=True):
            _add_round(branch.add(f"round {number}" if number else "start"), members)
    return tree


def _add_round(branch: Tree, members: Sequence[Row]) -> None:
    """Add the round's models, each below the one that was made from it."""
    ids = {row["model_id"] for row in members}
    child_of: dict[str, str] = {}
    for row in members:
        for parent in row["parents"]:
            if parent in ids:
                child_of.setdefault(parent, row["model_id"])
    below = _grouped(members, lambda row: child_of.get(row["model_id"]))
    waiting = [(branch, row) for row in reversed(below.get(None, []))]
    while waiting:
        place, row = waiting.pop()
        drawn = below.get(row["model_id"], [])
        added = place.add(_label(row, {each["model_id"] for each in drawn}))
        waiting.extend((added, each) for each in reversed(drawn))


def _grouped(rows: Sequence[Row], key: Any) -> dict[Any, list[Row]]:
    """Return the rows by their keys, both in the order in which they come."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _origin(row: Row) -> str:
    """Return where a model comes from, in words."""
    if row["model_store_ddc"] is None:
        return "deleted, or not to be seen"
    if row["job_id"] is not None:
        return f"job {row['job_id'][:8]}, {row['model_store_ddc']}"
    if row["origin"] is not None:
        return f"copied from node {row['origin']['node_id'][:8]} into {row['model_store_ddc']}"
    return f"put into {row['model_store_ddc']}"


def _label(row: Row, drawn: set[str]) -> Text:
    """Return one line on a model; `drawn` are the parents that the tree shows below it."""
    label = Text()
    label.append(row["model_id"][:8], style="cyan")
    if row["model_store_ddc"] is None:
        return label
    facts = [f"{row['model_kind'] or 'model'}{f' of {site}' if (site := row['site']) else ''}"]
    if (count := row["num_examples"]) is not None:
        facts.append(f"{count} example{'' if count == 1 else 's'}")
    if row["metrics"]:
        facts.append(metrics_text(row["metrics"]))
    if row.get("expired_at"):
        facts.append("expired")
    elsewhere = [parent[:8] for parent in row["parents"] if parent not in drawn]
    if elsewhere:
        facts.append(f"from {' '.join(elsewhere)}")
    label.append(f"  {', '.join(facts)}")
    return label
