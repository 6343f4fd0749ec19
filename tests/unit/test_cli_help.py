import subprocess
import sys
from pathlib import Path

import click
import pytest

from coordinator.cli.entry import cli
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
        "fedchord submit",
        "fedchord jobs",
        "fedchord watch",
        "fedchord abort",
        "fedchord sites",
        "fedchord sites add",
        "fedchord sites disable",
        "fedchord sites enable",
        "fedchord sites remove",
        "fedchord keys",
        "fedchord keys new",
        "fedchord keys show",
        "fedchord models",
        "fedchord download",
    ]


@pytest.mark.parametrize("path", COMMANDS)
def test_the_help_has_an_example_of_the_command(path: str) -> None:
    _, _, example = COMMANDS[path].get_help().partition("Example:")
    assert path in example


@pytest.mark.parametrize("path", [path for path in COMMANDS if path not in ("fedchord", "fedchord keys")])
def test_every_command_that_does_something_prints_json_if_asked(path: str) -> None:
    assert "as_json" in {parameter.name for parameter in COMMANDS[path].command.params}


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_says_what_it_is_for(path: str) -> None:
    options = [each for each in COMMANDS[path].command.params if isinstance(each, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_list_of_commands_says_of_each_what_its_own_help_says() -> None:
    listed = COMMANDS["fedchord"].get_help()
    for path, context in COMMANDS.items():
        if path.count(" ") == 1:
            name = path.removeprefix("fedchord ")
            summary = (context.command.help or "").splitlines()[0]
            assert f"  {name.ljust(8)}  {summary}\n" in listed


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
