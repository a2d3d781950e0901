"""`leveret publish`: one job from JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import click

from ..app import App
from ..codec import Decoder, UndecodableError
from ..envelope import JSON
from ..errors import ConfigurationError, InvalidJob, PublishError, PublishTimeout
from ..job import Job, Priority, spec_of
from ..outcome import MAX_DELAY_S
from ..process.loading import load
from ..settings import redact
from .output import number_of_seconds
from .target import find_target, near, run

_PUBLISH_TIMEOUT_S = 10.0


@click.command(short_help="Publish one job from JSON; print its id.")
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
