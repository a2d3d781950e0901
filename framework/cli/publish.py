"""`leveret publish`: publish one job from JSON."""

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
from ..job import Job, Priority, is_job_class, spec_of
from ..outcome import MAX_DELAY_S
from ..process.loading import load
from ..settings import redact_url
from .output import duration
from .target import app_options, find_target, near, run

_PUBLISH_TIMEOUT_S = 10.0


@click.command(short_help="Publish one job from JSON; print its id.")
@app_options
@click.argument("job", metavar="MODULE:CLASS")
@click.argument("payload", metavar="JSON")
@click.option(
    "--priority", type=click.Choice([level.value for level in Priority]), help="Priority.  [default: the job class's]"
)
@click.option(
    "--delay",
    "delay_s",
    metavar="DURATION",
    callback=duration(zero=True),
    help="Run the job at the earliest after this time, such as 90s, 15m or 1h30m.",
)
@click.option(
    "--at",
    metavar="TIME",
    help="Run the job at the earliest at this ISO time with UTC offset, such as 2026-07-01T09:00+02:00.",
)
@click.option("--id", "job_id", metavar="ID", help="The job's id.  [default: a new UUIDv7]")
@click.option(
    "--expires",
    "expires_s",
    metavar="DURATION",
    callback=duration(zero=False),
    help="Drop the job if it hasn't started within this time, such as 90s, 15m or 2d.",
)
@click.option(
    "--header", "-H", "headers", multiple=True, metavar="NAME=VALUE", help="A header with a text value. Repeatable."
)
@click.option("--broker", metavar="URL", help="The broker's URL, if there is no app.  [default: LEVERET_BROKER]")
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
    """Publish one job of MODULE:CLASS from JSON (- reads standard input). Print the job's id when the broker has confirmed it.

    APP (module:attribute, default LEVERET_APP) has the broker and the middleware for the publish.

    The JSON is decoded as that class, so a wrong type or a missing field is refused before anything is sent. An unknown field is
    ignored, as in a rolling deploy.

    \b
    Examples:
      leveret publish shop:app shop:Invoice '{"order": 7}'
      leveret publish shop:Invoice - --delay 1m < invoice.json
    """  # noqa: D301
    job_class = _job_class(job)
    body = sys.stdin.buffer.read() if payload == "-" else os.fsencode(payload)
    try:
        made = Decoder(job_class).decode(body, JSON)
    except UndecodableError as error:
        raise ConfigurationError(str(error).replace("the body", "the JSON", 1)) from None
    when = _moment(at)
    if delay_s is not None and when is not None:
        msg = "--delay and --at can't be combined"
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
        # a wrong login, vhost or queue type: trying again won't help
        if isinstance(error.__cause__, ConfigurationError):
            raise error.__cause__ from None
        again = ""
        if isinstance(error, PublishTimeout) and error.maybe_published:
            again = f"; the job may have been published: publish it again with --id {error.job_id}"
        error.args = (f"{error} (broker {redact_url(target.url)}){again}",)
        raise


def _job_class(path: str) -> type[Job]:
    found = load(path, "Class")
    if is_job_class(found) and spec_of(found) is not None:
        return found
    module = sys.modules[path.partition(":")[0]]
    jobs = [name for name, value in vars(module).items() if is_job_class(value) and spec_of(value)]
    if is_job_class(found):
        msg = f"{path!r} is an abstract job class, without a name and a queue, so it can't be published{near(path.partition(':')[2], jobs)}"
    else:
        msg = f"{path!r} isn't a Job class{near(path.partition(':')[2], jobs)}"
    raise ConfigurationError(msg)


def _moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        msg = (
            f"--at {text!r}: expected an ISO time with UTC offset, such as 2026-07-01T09:00+02:00 or 2026-07-01T07:00Z"
        )
        raise click.UsageError(msg)
    if (when - datetime.now(timezone.utc)).total_seconds() > MAX_DELAY_S:
        msg = f"--at {text!r} is more than 48 days from now; use a schedule for a later time"
        raise click.UsageError(msg)
    return when


def _headers(given: Sequence[str]) -> dict[str, str] | None:
    headers: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            msg = f"--header {text!r}: expected NAME=VALUE"
            raise click.UsageError(msg)
        headers[name] = value
    return headers or None
