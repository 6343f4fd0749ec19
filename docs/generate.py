"""Write what the reference pages say of the code, from the code.

    python -m docs.generate            write
    python -m docs.generate --check    fail if a page is not up to date

A page is written by hand but for what stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import click

from common import errors
from common.errors import FedChordError
from common.messages import ANSWERS, SITE_MESSAGES, Message, ModelReference, Shard, SourceShard
from common.queues import ANSWER_TASKS, SITE_TASKS, AnswerKind, Kind
from common.settings import ENV_PREFIX, Settings
from coordinator.cli.reference import reference
from coordinator.jobfile import GateTable, InitialModel, JobSpec, LateTable, ParticipationTable, StrategyTable
from coordinator.strategies import STRATEGIES
from coordinator.strategies.base import Strategy
from docs import meanings, method_meanings, methods
from docs.fields import describe_fields, field_table, table
from worker.edge_settings import EdgeSettings

REFERENCE = Path(__file__).with_name("reference")

_BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def settings_table() -> str:
    """Return every setting: variable, TOML key, type, default, meaning."""
    rows = [
        (f"`{ENV_PREFIX}{row.name.upper()}`", f"`{row.name}`", row.type, row.default, row.meaning)
        for row in describe_fields(Settings)
    ]
    return table(("variable", "key in the file", "type", "default", "meaning"), rows)


def error_tree() -> str:
    """Return the tree as the module draws it."""
    drawn = [line[4:] for line in (errors.__doc__ or "").splitlines() if line.startswith("    ")]
    return "```text\n" + "\n".join(drawn) + "\n```"


def error_table() -> str:
    """Return every error: its exit code, the error it is a kind of, and what it says."""
    rows = []
    for name, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, FedChordError):
            parent = error.__mro__[1].__name__
            rows.append((f"`{name}`", str(error.exit_code), f"`{parent}`", inspect.getdoc(error) or ""))
    return table(("error", "exit code", "a kind of", "what it says when there is nothing more exact"), rows)


def job_table() -> str:
    """Return the fields of a job file."""
    return field_table(describe_fields(JobSpec, meanings.JOB))


def strategy_field_table() -> str:
    """Return the fields of [strategy]."""
    return field_table(describe_fields(StrategyTable, meanings.STRATEGY))


def participation_table() -> str:
    """Return the fields of [participation]."""
    return field_table(describe_fields(ParticipationTable, meanings.PARTICIPATION))


def late_table() -> str:
    """Return the fields of [late]."""
    return field_table(describe_fields(LateTable, meanings.LATE))


def gate_table() -> str:
    """Return the fields of [gate]."""
    return field_table(describe_fields(GateTable, meanings.GATE))


def initial_model_table() -> str:
    """Return the fields of [initial_model]."""
    return field_table(describe_fields(InitialModel, meanings.INITIAL_MODEL))


def torch_config_table() -> str:
    """Return the keys that every torch trainer knows."""
    from worker.torch_trainer import TorchConfig  # imports torch, which takes seconds

    return field_table(describe_fields(TorchConfig, meanings.TORCH))


def edge_table() -> str:
    """Return the keys of edge.toml."""

    return field_table(describe_fields(EdgeSettings, method_meanings.EDGE))


def strategies() -> str:
    """Return every strategy with its paper and its options."""
    return "\n\n".join(_strategy(name, strategy) for name, strategy in STRATEGIES.items())


def _strategy(name: str, strategy: type[Strategy]) -> str:
    text = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", inspect.getdoc(strategy) or "")
    rows = describe_fields(strategy)
    options = field_table(rows) if rows else "It has no options."
    return f"## `{name}`\n\n{text}\n\n{options}"


def site_messages() -> str:
    """Return the kinds of message that a coordinator sends."""
    return "\n\n".join(_message(message, SITE_TASKS[Kind(message.kind)]) for message in SITE_MESSAGES.values())


def answers() -> str:
    """Return the kinds of message that a site sends."""
    return "\n\n".join(_message(message, ANSWER_TASKS[AnswerKind(message.kind)]) for message in ANSWERS.values())


def references() -> str:
    """Return what messages refer to models and files with."""
    parts = []
    for each in (ModelReference, SourceShard, Shard):
        rows = field_table(describe_fields(each, meanings.MESSAGE))
        parts.append(f"### {each.__name__}\n\n{inspect.getdoc(each)}\n\n{rows}")
    return "\n\n".join(parts)


def _message(message: type[Message], task: str) -> str:
    rows = field_table(describe_fields(message, meanings.MESSAGE))
    return f"### `{message.kind}`\n\n{inspect.getdoc(message)} Task: `{task}`.\n\n{rows}"


BLOCKS: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "error-tree": error_tree,
    "errors": error_table,
    "job": job_table,
    "strategy": strategy_field_table,
    "participation": participation_table,
    "late": late_table,
    "gate": gate_table,
    "initial-model": initial_model_table,
    "torch-config": torch_config_table,
    "strategies": strategies,
    "site-messages": site_messages,
    "answers": answers,
    "references": references,
    "model-store-methods": methods.methods,
    "model-store-documents": methods.documents,
    "model-store-states": methods.states,
    "model-store-errors": methods.error_codes,
    "model-store-limits": methods.limits,
    "edge-settings": edge_table,
}


def generated_pages() -> dict[Path, str]:
    """Return what every page with something generated in it should say, by file."""
    pages = {REFERENCE / "cli.md": reference()}
    for path in sorted(REFERENCE.glob("*.md")):
        text = path.read_text("utf-8")
        if _BLOCK.search(text):
            pages[path] = _BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}", text)
    return pages


def stale_pages() -> list[Path]:
    """Return the pages that do not say what they should."""
    return [path for path, text in generated_pages().items() if not path.exists() or path.read_text("utf-8") != text]


@click.command(help="Write what the reference pages say of the code.")
@click.option("--check", is_flag=True, help="Write nothing; fail if a page is not up to date.")
def main(check: bool) -> None:
    """Write the stale pages, or complain of them."""
    stale = stale_pages()
    if check and stale:
        names = ", ".join(path.name for path in stale)
        raise click.ClickException(f"{names}: not up to date; run `make docs`.")
    texts = generated_pages()
    for path in stale:
        path.write_text(texts[path], "utf-8")
        click.echo(f"Wrote {path.relative_to(REFERENCE.parent.parent)}.")


if __name__ == "__main__":
    main()
