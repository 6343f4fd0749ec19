import subprocess
import sys
from pathlib import Path

import click
import pytest

from coordinator.cli.entry import cli
from coordinator.cli.groups import ListingGroup
from coordinator.cli.reference import contexts, reference

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {context.command_path: context for context in contexts(click.Context(cli, info_name="fedchord"))}
HEAVY = ("celery", "kombu", "numpy", "pydantic", "redis", "rich", "sqlalchemy", "torch")


def test_the_commands_are_those_that_the_reference_promises() -> None:
    assert list(COMMANDS) == [
        "fedchord",
        "fedchord demo",
        "fedchord up",
        "fedchord down",
        "fedchord status",
        "fedchord serve",
        "fedchord submit",
        "fedchord jobs",
        "fedchord watch",
        "fedchord abort",
        "fedchord join",
        "fedchord leave",
        "fedchord why",
        "fedchord doctor",
        "fedchord quarantine",
        "fedchord quarantine list",
        "fedchord quarantine refuse",
        "fedchord quarantine release",
        "fedchord quarantine show",
        "fedchord sites",
        "fedchord sites add",
        "fedchord sites disable",
        "fedchord sites enable",
        "fedchord sites remove",
        "fedchord keys",
        "fedchord keys new",
        "fedchord keys show",
        "fedchord models",
        "fedchord models delete",
        "fedchord models get",
        "fedchord models keep",
        "fedchord models lineage",
        "fedchord models list",
        "fedchord models put",
        "fedchord models show",
        "fedchord verify",
        "fedchord gc",
        "fedchord store",
        "fedchord store close",
        "fedchord store create",
        "fedchord store delete",
        "fedchord store feedback",
        "fedchord store list",
        "fedchord store open",
        "fedchord store parties",
        "fedchord store parties add",
        "fedchord store parties list",
        "fedchord store parties remove",
        "fedchord store serve",
        "fedchord store tenants",
        "fedchord store tenants add",
        "fedchord store tenants disable",
        "fedchord store tenants enable",
        "fedchord store tenants list",
        "fedchord store tenants renew",
        "fedchord store transfer",
        "fedchord store upstreams",
        "fedchord store upstreams add",
        "fedchord store upstreams disable",
        "fedchord store upstreams enable",
        "fedchord store upstreams list",
        "fedchord store upstreams remove",
    ]


@pytest.mark.parametrize("path", COMMANDS)
def test_the_help_has_an_example_of_the_command(path: str) -> None:
    _, _, example = COMMANDS[path].get_help().partition("Example:")
    assert path in example


GROUPS = ("fedchord", "fedchord keys")  # which do nothing without a command


@pytest.mark.parametrize(
    "path", [path for path in COMMANDS if path not in GROUPS and not isinstance(COMMANDS[path].command, ListingGroup)]
)
def test_every_command_that_does_something_prints_json_if_asked(path: str) -> None:
    assert "as_json" in {parameter.name for parameter in COMMANDS[path].command.params}


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_says_what_it_is_for(path: str) -> None:
    options = [each for each in COMMANDS[path].command.params if isinstance(each, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_list_of_commands_says_of_each_what_its_own_help_says() -> None:
    listed = COMMANDS["fedchord"].get_help()
    width = max(len(path.split()[1]) for path in COMMANDS if path.count(" ") == 1)
    for path, context in COMMANDS.items():
        if path.count(" ") == 1:
            name = path.removeprefix("fedchord ")
            summary = (context.command.help or "").splitlines()[0]
            assert f"  {name.ljust(width)}  {summary}\n" in listed


def test_the_documentation_is_what_the_commands_say() -> None:
    assert (ROOT / "docs" / "reference" / "cli.md").read_text("utf-8") == reference()


def test_the_help_needs_nothing_that_is_slow_to_import() -> None:
    program = (
        "import sys, coordinator.cli.entry as e; e.cli.main(['--help'], standalone_mode=False); print(*sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    loaded = set(printed.splitlines()[-1].split())
    assert "coordinator.cli.entry" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_an_unknown_command_ends_with_the_code_of_wrong_input() -> None:
    with pytest.raises(click.UsageError) as caught:
        cli.main(["uncover"], standalone_mode=False)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("path", [path for path in COMMANDS if isinstance(COMMANDS[path].command, ListingGroup)])
def test_a_group_that_lists_has_no_options_that_a_command_would_not_see(path: str) -> None:
    assert COMMANDS[path].command.params == []
    assert f"{path} list" in COMMANDS


def test_an_option_before_a_command_is_refused_rather_than_passed_over() -> None:
    with pytest.raises(click.UsageError, match="unexpected extra argument"):
        cli.main(["store", "upstreams", "--url", "http://127.0.0.1:9", "remove", "5b07"], standalone_mode=False)
