"""The group `fedchord`: which commands there are, and how each one ends.

A command's module is imported when the command is called, so that `fedchord --help` needs click alone.
"""

import errno
import importlib
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import click

from common.errors import DiskFull, FedChordError
from common.logs import set_up_logs

_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_COMMANDS = {  # name -> (where it is defined, what it does)
    "demo": ("coordinator.cli.demo:demo", "Train on handwritten digits at ten sites, start to end."),
    "up": ("coordinator.cli.stack:up", "Start an embedded stack: broker, coordinator workers, sites."),
    "down": ("coordinator.cli.stack:down", "Stop the embedded stack; its data stays."),
    "status": ("coordinator.cli.stack:status", "Show how the embedded stack is."),
    "serve": ("coordinator.cli.serve:serve", "Serve the coordinator's models and jobs over HTTP."),
    "submit": ("coordinator.cli.jobs:submit", "Submit a job file."),
    "jobs": ("coordinator.cli.jobs:jobs", "List the jobs, or show one."),
    "watch": ("coordinator.cli.jobs:watch", "Follow a job until it ends."),
    "abort": ("coordinator.cli.jobs:abort", "End a job now."),
    "join": ("coordinator.cli.membership:join", "Let a site take part in a job from its next round on."),
    "leave": ("coordinator.cli.membership:leave", "Take a site out of a job."),
    "why": ("coordinator.cli.why:why", "Say what a job waits for, since when and until when."),
    "doctor": ("coordinator.cli.doctor:doctor", "Check all that the coordinator needs, and say what to mend."),
    "quarantine": ("coordinator.cli.quarantine:quarantine", "List, show, release and refuse quarantined updates."),
    "dead-letters": ("coordinator.cli.dead_letters:dead_letters", "List what was set aside from the queues."),
    "sites": ("coordinator.cli.sites:sites", "List, enroll, enable, disable and remove sites."),
    "keys": ("coordinator.cli.keys:keys", "Make a signing key, or show its public half."),
    "models": ("coordinator.cli.models:models", "List, show, put, get, keep and delete models."),
    "verify": ("coordinator.cli.verify:verify", "Recompute a global model from its updates, and compare."),
    "gc": ("coordinator.cli.gc:gc", "Remove the bytes that are not needed or not kept any more."),
    "store": ("coordinator.cli.store:store", "Serve models, and manage model stores, tenants and upstreams."),
}


class LazyGroup(click.Group):
    """A group that imports a command when it is called, and lists them all without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which people meet them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; return None if there is none of that name."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    context_settings={"max_content_width": 100},
    epilog="""\b
Example:
  fedchord up --sites 3 --trainer digits-mlp=examples.digits.trainer:DigitsTrainer
  fedchord submit job.toml --watch

\b
Exit codes:
  0    done
  1    something else went wrong
  2    the input is not valid: an option, a setting, a job file
  3    there is no such job, site, model or stack
  4    it is not allowed: by the state (it runs already, or has ended), or to this caller
  5    a service, a port or disk space is missing
  6    the job that was waited for failed or was aborted
  130  interrupted""",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="FEDCHORD_CONFIG",
    show_envvar=True,
    help="The coordinator's settings file. Without it: fedchord-stack/fedchord.toml if it is there, "
    "else the variables FEDCHORD_… alone.",
)
@click.option("--debug", is_flag=True, help="Log everything, and show where an error comes from.")
@click.version_option(package_name="fedchord", prog_name="fedchord")
@click.pass_context
def cli(ctx: click.Context, config: Path | None, debug: bool) -> None:
    """Federated learning over a message queue.

    A coordinator sends the parts of each round to its sites' queues; the sites train on data that never leaves them.
    """
    ctx.obj = config
    set_up_logs("DEBUG" if debug else "WARNING", "text")


def main() -> NoReturn:
    """Run the command line; every error ends as one sentence and an exit code."""
    try:
        code = cli.main(standalone_mode=False, prog_name="fedchord")
        sys.exit(code if isinstance(code, int) else 0)
    except FedChordError as error:
        _end(error, error.message, error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("fedchord: interrupted", err=True)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            _end(error, f"The disk is full ({error.filename}); free some space and try again.", DiskFull.exit_code)
        _end(error, f"{type(error).__name__}: {error}", 1)
    except Exception as error:
        _end(error, f"{type(error).__name__}: {error} (this should not happen; --debug shows where)", 1)


def _end(error: Exception, sentence: str, code: int) -> NoReturn:
    if logging.getLogger().isEnabledFor(logging.DEBUG) or os.environ.get("FEDCHORD_LOG_LEVEL") == "DEBUG":
        traceback.print_exception(error)
    click.echo(f"fedchord: {sentence}", err=True)
    sys.exit(code)
