"""The command line: `leveret work`, `cron`, `publish`, `describe`, `queues`, `dead`; a file per command.

Only the command line imports click and rich: `work` hands over to `python -m leveret.process.main`, which has neither.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from .. import __version__
from ..errors import LeveretError
from ..process.logs import one_line, report_error, set_up_logs
from ..settings import environment, redact
from .cron import cron
from .dead import dead
from .describe import describe
from .publish import publish
from .queues import queues
from .work import work


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="leveret %(version)s")
def cli() -> None:
    """Typed jobs through RabbitMQ (or a local SQLite file): run workers and cron, publish, look and repair.

    \b
    Where things come from, unless an option says it:
      LEVERET_APP     the app, as module:attribute, such as shop:app
      LEVERET_BROKER  the broker's URL: amqp://user:password@host/vhost or sqlite:///jobs.db
      LEVERET_LOG     debug, info, warning or error; debug also shows tracebacks

    \b
    Exit codes:
      0    done
      1    something failed: no broker, a job that couldn't be published or replayed, a worker cut off
      2    wrong usage or configuration: mend it and start again
      130  interrupted by ^C

    \b
    Example:
      leveret work shop:app --queue emails=50 --processes 4
    """  # noqa: D301 - \b is click's mark of a paragraph that isn't to be filled


for command in (work, cron, publish, describe, queues, dead):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` unless given); return the exit code, and never a traceback for what a user can mend."""
    try:
        level = environment(os.environ).log_level.lower()
        # a worker and a cron are told of at info; the others answer on standard output, and warn
        if level == "debug" or not {"work", "cron"}.intersection(sys.argv[1:2] if arguments is None else arguments[:1]):
            set_up_logs("warning" if level == "info" else level)
        answer = cli.main(arguments, prog_name="leveret", standalone_mode=False)
        sys.stdout.flush()
        return answer if isinstance(answer, int) else 0
    except click.UsageError as error:
        if error.ctx is None or error.ctx.get_help() == error.message:  # no command given: its help is the answer
            print(error.message, file=sys.stderr)
        else:
            said = redact(one_line(error.format_message())).rstrip(".")
            print(f"leveret: {said} (see {error.ctx.command_path} --help)", file=sys.stderr)
        return 2
    except (click.Abort, KeyboardInterrupt):
        print("leveret: interrupted", file=sys.stderr)
        return 130
    except LeveretError as error:
        return report_error(error)
    except BrokenPipeError:
        # whoever read our output has seen enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
