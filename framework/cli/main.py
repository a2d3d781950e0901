"""The command line: `leveret work`, `cron`, `relay`, `publish`, `describe`, `queues`, `dead`, `jobs`, `migrate`; a file per command.

Only the command line imports click and rich. `work` hands over to `python -m leveret.process.main`, which imports neither.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import cast

import click

from .. import __version__
from ..errors import LeveretError
from ..process.logs import one_line, report_error, set_up_logs
from ..process.streams import discard, open_closed_streams, tell
from ..settings import environment, redact
from .cron import cron
from .dead import dead
from .describe import describe
from .jobs import jobs
from .migrate import migrate
from .publish import publish
from .queues import queues
from .relay import relay
from .work import work

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What the system says when a full disk, or a terminal that is gone, takes no output."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="leveret %(version)s")
def cli() -> None:
    """Run typed jobs through RabbitMQ, PostgreSQL, Redis or a local SQLite file: run workers and cron, publish jobs, inspect and repair queues.

    \b
    Environment, unless an option overrides it:
      LEVERET_APP          the app, module:attribute: shop:app
      LEVERET_BROKER       amqp://user:password@host/vhost,
                           postgresql://user:password@host/db,
                           redis://user:password@host:6379/0
                           or sqlite:///jobs.db
      LEVERET_OUTBOX       postgresql://user:password@host/db
      LEVERET_STORE        where results are kept, such as
                           postgresql://user:password@host/db
      LEVERET_CONCURRENCY  jobs at once per process and queue:
                           100,emails=50
      LEVERET_LOG          debug (adds tracebacks), info,
                           warning, error or critical

    \b
    Exit codes:
      0    done
      1    failed: no broker, a job not published or replayed,
           jobs cut off
      2    wrong usage or configuration
      130  interrupted by ^C

    \b
    Example:
      leveret work shop:app --queue emails=50 --processes 4
    """  # noqa: D301 - \b keeps click from rewrapping a paragraph


for command in (work, cron, relay, publish, describe, queues, dead, jobs, migrate):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (default: `sys.argv`) and return the exit code.

    A fault that a user can correct prints one line, never a traceback.
    """
    open_closed_streams()
    # a job, or `describe`, may have characters that the output's encoding lacks
    cast("TextIOWrapper", sys.stdout).reconfigure(errors="backslashreplace")
    try:
        level = environment(os.environ).log_level.lower()
        # workers, cron and relays log at info; the other commands answer on standard output and log warnings only
        if level == "debug" or not {"work", "cron", "relay"}.intersection(
            sys.argv[1:2] if arguments is None else arguments[:1]
        ):
            set_up_logs("warning" if level == "info" else level)
        answer = cli.main(arguments, prog_name="leveret", standalone_mode=False)
        sys.stdout.flush()
        return answer if isinstance(answer, int) else 0
    except click.UsageError as error:
        if error.ctx is not None and error.ctx.get_help() == error.message:  # no command given: print the help
            tell(error.message)
        else:
            message = redact(one_line(error.format_message())).rstrip(".")
            tell(f"leveret: {message}" + (f" (see {error.ctx.command_path} --help)" if error.ctx else ""))
        return 2
    except (click.Abort, KeyboardInterrupt):
        tell("leveret: interrupted")
        return 130
    except LeveretError as error:
        return report_error(error)
    except OSError as error:
        discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # the reader who closed the pipe has seen enough
            where = "standard output can't be written: " if error.errno in _UNWRITABLE else ""
            tell(f"leveret: {where}{redact(one_line(str(error)))}")
        return 1
