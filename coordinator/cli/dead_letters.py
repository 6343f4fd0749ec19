"""The command `dead-letters`."""

from contextlib import closing
from pathlib import Path

import click

from coordinator.cli.output import console, coordinator_settings, document, json_option, print_json, size_text, table

_SHOWN = 50  # of each queue in a table


@click.command(
    name="dead-letters",
    epilog="""\b
Example:
  fedchord dead-letters
  fedchord dead-letters site.clinic-a --json
  fedchord dead-letters --clear coordinator""",
)
@click.argument("queue", required=False)
@click.option("--clear", metavar="QUEUE", help="Forget what was set aside from this queue.")
@json_option
@click.pass_obj
def dead_letters(config: Path | None, queue: str | None, clear: str | None, as_json: bool) -> None:
    """List what was set aside from the queues.

    No worker could handle it: it is no message, it asks for what no message may ask for, or it ended its worker again
    and again. Of each queue the newest 1,000 are kept, and listed with the newest first; the JSON has the first 64 KiB
    of each.
    """
    import base64

    from common.broker import connect  # Celery and Redis, which many commands do without, cost 0.4 s
    from common.dead_letters import MAX_DEAD, forget_dead_letters, queues_with_dead_letters, read_dead_letters

    with closing(connect(coordinator_settings(config))) as client:
        if clear is not None:
            forgotten = forget_dead_letters(client, clear)
            if as_json:
                print_json({"queue": clear, "forgotten": forgotten})
            else:
                click.echo(f"Forgot {forgotten} of {clear}.")
            return
        queues = queues_with_dead_letters(client) if queue is None else [queue]
        letters = [
            letter
            for each in queues
            for letter in read_dead_letters(client, each, limit=MAX_DEAD if as_json else _SHOWN)
        ]
    if as_json:
        print_json(
            [
                {
                    "queue": letter.queue,
                    "at": document(letter.at),
                    "reason": letter.reason,
                    "bytes": letter.size,
                    "base64": base64.b64encode(letter.begins).decode("ascii"),
                }
                for letter in letters
            ]
        )
        return
    rows = [(letter.queue, letter.at, size_text(letter.size), _printable(letter.reason)) for letter in letters]
    console().print(table(["QUEUE", "SINCE", "SIZE", "REASON"], rows, empty="Nothing was set aside."), markup=False)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
