from typing import Any

from rich.console import Console

from coordinator.cli.lineage_view import draw_lineage

JOB = "11111111-0000-0000-0000-000000000000"


def row(model_id: str, *parents: str, **more: Any) -> dict[str, Any]:
    known = {"model_store_ddc": "ddc:a", "model_kind": "", "job_id": None, "site": None, "round": 0, "origin": None}
    return {"model_id": model_id, "parents": list(parents), "num_examples": None, "metrics": {}, **known, **more}


def drawn(rows: list[dict[str, Any]]) -> list[str]:
    console = Console(width=100, highlight=False)
    with console.capture() as capture:
        console.print(draw_lineage(rows))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_job_has_its_rounds_below_each_other_and_in_each_the_updates_below_their_model() -> None:
    made = {"job_id": JOB, "model_kind": "global"}
    update = {"job_id": JOB, "model_kind": "update"}
    rows = [
        row("global-2", "global-1", "update-a", **made, round=2, metrics={"accuracy": 0.5}),
        row("global-1", "initial", "update-b", **made, round=1),
        row("initial", job_id=JOB, model_kind="initial", site="site-1"),
        row("update-b", "initial", **update, round=1, site="site-1", num_examples=1),
        row("update-a", "global-1", **update, round=2, site="site-2", num_examples=7),
    ]
    assert drawn(rows) == [
        "global-2  global, accuracy 0.5, from global-1 update-a",
        "└── job 11111111, ddc:a",
        "    ├── round 2",
        "    │   └── global-2  global, accuracy 0.5, from global-1",
        "    │       └── update-a  update of site-2, 7 examples, from global-1",
        "    ├── round 1",
        "    │   └── global-1  global, from initial",
        "    │       └── update-b  update of site-1, 1 example, from initial",
        "    └── start",
        "        └── initial  initial of site-1",
    ]


def test_what_no_job_made_is_listed_by_where_it_comes_from() -> None:
    origin = {"node_id": "node-one-and-more", "model_id": "x"}
    rows = [row("mean", "copy", "gone"), row("copy", origin=origin), row("gone", model_store_ddc=None, metrics=None)]
    assert drawn(rows) == [
        "mean  model, from copy gone",
        "├── put into ddc:a",
        "├── copied from node node-one into ddc:a",
        "│   └── copy  model",
        "└── deleted, or not to be seen",
        "    └── gone",
    ]


def test_a_long_chain_is_not_deep() -> None:
    rows = [row(f"{n:08}", f"{n - 1:08}", job_id=JOB, round=n) for n in range(3000, 0, -1)]
    assert max(map(len, drawn(rows))) < 100
    chain = [row(f"{n:08}", f"{n - 1:08}") for n in range(3000, 0, -1)]
    assert max(map(len, drawn(chain))) < 100


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    assert drawn([row("one", model_kind="[bold]x[/]")])[0] == "one  [bold]x[/]"
