"""Write the reference of the command line from what click knows.

python -m coordinator.cli.reference > docs/reference/cli.md
"""

from collections.abc import Iterator

import click

from coordinator.cli.entry import cli

_WIDTH = 100  # columns


def reference() -> str:
    """Return docs/reference/cli.md."""
    parts = ["# The command line", "Made by `python -m coordinator.cli.reference`; change the commands, not this page."]
    for context in contexts(click.Context(cli, info_name="fedchord", terminal_width=_WIDTH)):
        parts.append(f"{'#' * (_depth(context) + 2)} {context.command_path}")
        parts.append(f"```text\n{context.get_help().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def contexts(context: click.Context) -> Iterator[click.Context]:
    """Yield the command's context and those of all its subcommands."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None:
                yield from contexts(click.Context(command, parent=context, info_name=name, terminal_width=_WIDTH))


def _depth(context: click.Context) -> int:
    return 0 if context.parent is None else 1 + _depth(context.parent)


if __name__ == "__main__":
    click.echo(reference(), nl=False)
