"""`leveret migrate`: make and upgrade the tables that an app needs in a database."""

from __future__ import annotations

import os

import click

from ..errors import BrokerUnavailable, ConfigurationError
from ..process.loading import load_app
from ..runtime import Runtime
from ..schemes import NO_BROKER, open_migrator
from ..settings import environment, redact_url
from .output import print_text
from .target import app_options, run


@click.command(short_help="Make and upgrade the tables that the app needs in a database.")
@app_options
@click.option("--url", metavar="URL", help="The database's URL, instead of an app.  [default: LEVERET_BROKER]")
@click.option("--check", is_flag=True, help="Change nothing; exit with 2 if a migration is pending.")
@click.option("--sql", is_flag=True, help="Change nothing; print the SQL of what is pending.")
def migrate(app: str | None, url: str | None, check: bool, sql: bool) -> None:
    """Make and upgrade what APP (module:attribute, default LEVERET_APP) needs in a database. Nothing else changes its tables.

    Run it before the new version of a program starts. Programs of the version before go on meanwhile. Several at once are safe, and
    a second run changes nothing. RabbitMQ, SQLite and memory need no migrations. The databases of the outbox and of the job store, if
    the app has them, are migrated too.

    --sql prints what `migrate` would run, for other tools. Without an answer from the database it prints all migrations.

    \b
    Examples:
      leveret migrate shop:app
      leveret migrate --url postgresql://owner@db/shop --check
    """  # noqa: D301
    if check and sql:
        msg = "--check and --sql can't be combined"
        raise click.UsageError(msg)
    behind: list[str] = []
    runtime, databases = _databases(app, url)
    for what, database in databases.items():
        migrator = open_migrator(database, runtime)
        if migrator is None:
            print_text(f"the {what} {redact_url(database)} needs no migrations: leveret makes what it needs", err=sql)
        elif sql:
            try:
                click.echo(migrator.sql(run(migrator.pending())), nl=False)
            except BrokerUnavailable as error:
                print_text(f"{error}; these are all migrations", err=True)
                click.echo(migrator.sql(None), nl=False)
        elif not (pending := run(migrator.pending())):
            print_text(f"the {what} {migrator.what} is up to date")
        elif check:
            behind.append(f"the {what} {migrator.what} lacks {', '.join(pending)}")
        else:
            run(migrator.migrate(print_text))
    if behind:
        raise ConfigurationError("; ".join(behind))


def _databases(app_path: str | None, url: str | None) -> tuple[Runtime, dict[str, str]]:
    """Return the runtime, and the URL of each database that the options name, by what the app has it for."""
    if app_path is not None and url is not None:
        msg = "an app and --url can't be combined: an app has its databases"
        raise click.UsageError(msg)
    known = environment(os.environ)
    if url is None and (app_path := app_path or known.app) is not None:
        app = load_app(app_path, modules=False)
        runtime, url, outbox, store = app.runtime(), app.broker_url(), app.outbox_url(), app.store_url()
    else:
        outbox, store = (None, None) if url else (known.outbox, known.store)
        runtime, url = Runtime(app="leveret"), url or known.broker
    if not url:
        msg = f"{NO_BROKER}; or give an app, such as shop:app, as argument, with --app or in LEVERET_APP"
        raise ConfigurationError(msg)
    databases: dict[str, str] = {}
    for what, database in (("broker", url), ("outbox", outbox), ("store", store)):
        if database and database not in databases.values():
            databases[what] = database
    return runtime, databases
