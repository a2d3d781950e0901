"""The command line: `leveret work`, `cron`, `publish`; the rest in cli_describe, cli_queues and cli_dead.

Only the command line imports click and rich: `work` hands over to `python -m leveret.worker`, which has neither.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import click
import msgspec

from . import __version__
from .app import App
from .cli_dead import dead
from .cli_describe import describe
from .cli_print import number_of_seconds
from .cli_queues import queues
from .cli_target import app_path, find_target, near, run
from .codec import Decoder, UndecodableError
from .envelope import JSON
from .errors import ConfigurationError, InvalidJob, LeveretError, PublishError, PublishTimeout
from .job import Job, Priority, spec_of
from .loading import load, load_app
from .logs import LEVELS, one_line, set_up_logs
from .outcome import MAX_DELAY_S
from .settings import environment, redact

_PUBLISH_TIMEOUT_S = 10.0
_log_level_option = click.option(
    "--log-level", type=click.Choice(LEVELS, case_sensitive=False), help="Else LEVERET_LOG.  [default: info]"
)


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


@cli.command(short_help="Run a worker: take jobs from queues and run their handlers.")
@click.argument("app", required=False, metavar="[APP]")
@click.option(
    "--queue",
    "-q",
    "queue_limits",
    multiple=True,
    metavar="NAME[=CONCURRENCY]",
    help="Take from this queue alone, with at most so many jobs of it at once in a process; may be repeated. None given: every queue of the app.",
)
@click.option(
    "--concurrency",
    "-c",
    metavar="N",
    type=click.IntRange(min=1),
    help="Jobs at once in a process, over all its queues.  [default: 100, of which 8 in threads]",
)
@click.option(
    "--processes",
    "-p",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Worker processes; one that dies is restarted.",
)
@click.option(
    "--grace",
    "grace_s",
    metavar="SECONDS",
    default="30",
    show_default=True,
    callback=number_of_seconds(zero=True),
    help="How long a stopping worker lets its jobs finish.",
)
@click.option(
    "--reload",
    is_flag=True,
    help="For development: restart when a Python file below this folder changes. Needs leveret[reload].",
)
@_log_level_option
def work(
    app: str | None,
    queue_limits: tuple[str, ...],
    concurrency: int | None,
    processes: int,
    grace_s: float,
    reload: bool,
    log_level: str | None,
) -> None:
    """Run a worker of APP (module:attribute, else LEVERET_APP): take jobs from its queues and run their handlers.

    It waits for a broker that is away. SIGTERM or ^C stops it: it takes nothing more, lets its jobs finish within the grace, and
    exits with 0; a second one, or the end of the grace, cuts them off: exit 1, and the broker delivers those again.

    \b
    Example:
      leveret work shop:app --queue emails=50 --queue pdf --processes 4
    """  # noqa: D301
    from .worker import WorkOptions

    options = WorkOptions(
        app=app_path(app),
        queues=_queue_limits(queue_limits),
        concurrency=concurrency,
        processes=processes,
        grace_s=grace_s,
        log_level=(log_level or environment(os.environ).log_level).lower(),
        reload=reload,
    )
    # a new interpreter in this process: neither click nor rich stays in a worker's memory, and signals reach the worker itself
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "leveret.worker", msgspec.json.encode(options).decode()])  # noqa: S606 - no shell is meant


def _queue_limits(given: Sequence[str]) -> dict[str, int | None]:
    limits: dict[str, int | None] = {}
    for text in given:
        name, equals, limit = text.partition("=")
        if not name or (equals and not (limit.isascii() and limit.isdecimal() and int(limit) > 0)):
            msg = f"--queue {text!r}: it is NAME or NAME=CONCURRENCY, CONCURRENCY a whole number from 1, such as emails=50"
            raise click.UsageError(msg)
        if name in limits:
            msg = f"--queue {name!r} is given twice"
            raise click.UsageError(msg)
        limits[name] = int(limit) if equals else None
    return limits


@cli.command(short_help="Publish an app's recurring jobs at their times.")
@click.argument("app", required=False, metavar="[APP]")
@_log_level_option
def cron(app: str | None, log_level: str | None) -> None:
    """Publish the recurring jobs of APP (module:attribute, else LEVERET_APP) at their times. Run one of it.

    A slot's job has an id made of app, schedule and time, so a restart can't publish another one for it. What fell due while no cron ran
    is skipped. SIGTERM or ^C stops it after the publish that is under way: exit 0.

    \b
    Example:
      leveret cron shop:app
    """  # noqa: D301
    from .scheduler import run as run_schedules

    path = app_path(app)
    set_up_logs(log_level or environment(os.environ).log_level)
    loaded = load_app(path)
    find_target(path, None, modules=False)
    code = run(run_schedules(loaded))
    if code:
        logging.shutdown()
        os._exit(code)  # a cron function that doesn't return would keep the interpreter from ending


@cli.command(short_help="Publish one job from JSON; print its id.")
@click.argument("job", metavar="MODULE:CLASS")
@click.argument("payload", metavar="JSON")
@click.option("--priority", type=click.Choice([level.value for level in Priority]), help="Else the job's own.")
@click.option(
    "--delay",
    "delay_s",
    metavar="SECONDS",
    callback=number_of_seconds(zero=True),
    help="Not before so many seconds from now.",
)
@click.option("--at", metavar="TIME", help="Not before this ISO time with its offset, such as 2026-07-01T09:00+02:00.")
@click.option("--id", "job_id", metavar="ID", help="The job's id; else a new UUIDv7.")
@click.option(
    "--expires",
    "expires_s",
    metavar="SECONDS",
    callback=number_of_seconds(zero=False),
    help="Not run later than so many seconds from now.",
)
@click.option(
    "--header", "-H", "headers", multiple=True, metavar="NAME=VALUE", help="A header, as text; may be repeated."
)
@click.option("--app", metavar="MODULE:APP", help="Publish as this app: its broker and its layers; else LEVERET_APP.")
@click.option("--broker", metavar="URL", help="The broker, where no app is at hand; else LEVERET_BROKER.")
def publish(
    job: str,
    payload: str,
    priority: str | None,
    delay_s: float | None,
    at: str | None,
    job_id: str | None,
    expires_s: float | None,
    headers: tuple[str, ...],
    app: str | None,
    broker: str | None,
) -> None:
    """Publish one job of MODULE:CLASS from JSON (- for standard input); print its id once the broker has confirmed it.

    The JSON is read as that class, so a wrong type or a missing field is refused
    here, before anything is sent; a field that the class doesn't have is ignored, as in a rolling deploy.

    \b
    Examples:
      leveret publish shop.jobs:SendInvoice '{"order_id": 7, "email": "a@example.org"}' --app shop:app
      leveret publish shop.jobs:SendInvoice - --priority high --delay 60 --broker sqlite:///shop.db < invoice.json
    """  # noqa: D301
    job_class = _job_class(job)
    body = sys.stdin.buffer.read() if payload == "-" else os.fsencode(payload)
    try:
        made = Decoder(job_class).decode(body, JSON)
    except UndecodableError as error:
        raise ConfigurationError(str(error).replace("the body is", "the JSON is", 1)) from None
    when = _moment(at)
    if delay_s is not None and when is not None:
        msg = "--delay and --at exclude each other"
        raise click.UsageError(msg)
    target = find_target(app, broker, modules=False)
    sending: App[Any] = target.app or App("leveret", broker=target.url)

    async def send() -> str:
        async with sending.publisher() as publisher:
            receipt = await publisher.publish(
                made,
                priority=None if priority is None else Priority(priority),
                delay_s=delay_s,
                at=when,
                job_id=job_id,
                headers=_headers(headers),
                expires_s=expires_s,
                timeout_s=_PUBLISH_TIMEOUT_S,
            )
            return receipt.job_id

    try:
        click.echo(run(send()))
    except InvalidJob as error:
        raise ConfigurationError(str(error)) from None
    except PublishError as error:
        if isinstance(
            error.__cause__, ConfigurationError
        ):  # a login, a vhost, a queue of another type: trying again won't help
            raise error.__cause__ from None
        again = ""
        if isinstance(error, PublishTimeout) and error.maybe_published:
            again = f"; it may have arrived: to be safe publish it again with --id {error.job_id}"
        error.args = (f"{error} (broker {redact(target.url)}){again}",)
        raise


def _job_class(path: str) -> type[Job]:
    found = load(path, "Class")
    if isinstance(found, type) and issubclass(found, Job) and spec_of(found) is not None:
        return found
    module = sys.modules[path.partition(":")[0]]
    jobs = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Job) and spec_of(value)
    ]
    if isinstance(found, type) and issubclass(found, Job):
        msg = f"{path!r} is abstract: it names no job and no queue, so it can't be published{near(path.partition(':')[2], jobs)}"
    else:
        msg = f"{path!r} is no Job class{near(path.partition(':')[2], jobs)}"
    raise ConfigurationError(msg)


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        msg = f"--at {text!r}: it is an ISO time with its offset from UTC, such as 2026-07-01T09:00+02:00 or 2026-07-01T07:00Z"
        raise click.UsageError(msg)
    if (when - datetime.now(timezone.utc)).total_seconds() > MAX_DELAY_S:
        msg = f"--at {text!r} is more than 48 days from now; use a schedule for what is so far off"
        raise click.UsageError(msg)
    return when


def _headers(given: Sequence[str]) -> dict[str, str] | None:
    headers: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            msg = f"--header {text!r}: it is NAME=VALUE"
            raise click.UsageError(msg)
        headers[name] = value
    return headers or None


cli.add_command(describe)
cli.add_command(queues)
cli.add_command(dead)


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
        print(f"leveret: {redact(' '.join(str(error).split()))}", file=sys.stderr)
        logging.getLogger("leveret").debug("where it comes from", exc_info=error)
        return 2 if isinstance(error, ConfigurationError) else 1
    except BrokenPipeError:
        # whoever read our output has seen enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
