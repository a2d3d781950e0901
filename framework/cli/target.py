"""The target of a command: a broker, given by an app or by a URL, and its queues."""

from __future__ import annotations

import asyncio
import difflib
import functools
import os
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
import msgspec

from ..admin import Admin, Depth, OutboxAdmin
from ..app import App
from ..errors import ConfigurationError
from ..job import Queue
from ..process.loading import load_app
from ..runtime import Runtime
from ..schemes import NO_BROKER, NO_STORE, broker_module, can_store, open_outbox_admin, open_store
from ..settings import environment, redact_url

if TYPE_CHECKING:
    from ..store import Store

_T = TypeVar("_T")
_CLOSE_S = 5.0


class Target(msgspec.Struct, frozen=True):
    """A broker, and the app if the command was given one."""

    url: str
    runtime: Runtime
    app: App[Any] | None
    queues: dict[str, Queue]
    """The app's queues by name."""
    outbox: str | None = None
    """The URL of the outbox, if there is one."""
    dead_of_outbox: bool = False
    """Whether the command is for the dead letters of the outbox, and not for those of the broker."""

    def queue(self, name: str) -> Queue:
        """Return the app's queue `name`, or a plain `Queue` if the app has none; ConfigurationError for an invalid name."""
        if name in self.queues:
            return self.queues[name]
        try:
            return Queue(name)
        except ValueError as error:
            base, dot, ending = name.rpartition(".")
            hint = (
                f"; `leveret dead list {base}` shows the dead letters of {base}"
                if dot and base and ending == "dead"
                else ""
            )
            if re.fullmatch(r"[\w.]+:[\w.]+", name):
                hint = f"; did you mean --app {name}?"
            raise ConfigurationError(f"{error}{hint}") from None

    @asynccontextmanager
    async def admin(self) -> AsyncGenerator[Admin, None]:
        """Open the broker's admin, and close it at the end of the block."""
        admin = broker_module(self.url).open_admin(self.url, self.runtime)
        try:
            yield admin
        finally:
            with suppress(TimeoutError):
                await asyncio.wait_for(admin.close(), _CLOSE_S)

    @asynccontextmanager
    async def outbox_admin(self) -> AsyncGenerator[OutboxAdmin, None]:
        """Open the outbox's admin, and close it at the end of the block; ConfigurationError if there is no outbox."""
        if self.outbox is None:
            msg = 'there is no outbox; set App(outbox="postgresql://…") or LEVERET_OUTBOX to the URL of its database'
            raise ConfigurationError(msg)
        admin = open_outbox_admin(self.outbox, self.runtime)
        try:
            yield admin
        finally:
            with suppress(TimeoutError):
                await asyncio.wait_for(admin.close(), _CLOSE_S)

    async def depth_of(self, admin: Admin, name: str) -> Depth:
        """Return the depths of queue `name`; ConfigurationError, with similar names, if the queue doesn't exist."""
        [depth] = await admin.depths([self.queue(name)])
        if depth.exists or depth.dead or name in self.queues:
            return depth
        msg = f"no queue {name!r} on {redact_url(self.url)}{near(name, self.queues)}"
        raise ConfigurationError(msg)


class StoreTarget(msgspec.Struct, frozen=True):
    """A job store."""

    url: str
    runtime: Runtime
    app: str | None
    """MODULE:APP, if an app gave the URL."""

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[Store, None]:
        """Open the store, and close it at the end of the block."""
        store = open_store(self.url, self.runtime)
        try:
            yield store
        except ValueError as error:  # an id, or another word of the command, that no store can have
            raise ConfigurationError(str(error)) from error
        finally:
            with suppress(TimeoutError):
                await asyncio.wait_for(store.close(), _CLOSE_S)


def near(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with similar names, else the list of known names; "" without any."""
    names = list(known)
    if close := difflib.get_close_matches(name, names, 3, cutoff=0.6):
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= 20 else ""


class _App(click.Argument):
    """The argument [APP], which may be left out before a command's other arguments.

    click gives the first word to the first argument. This class passes a word that isn't an app on to the next argument.
    """

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        """Move the words on if the first isn't an app; a word too many joins `args`, which click reports."""
        words = cast("dict[str | None, Any]", opts)
        others = [other for other in ctx.command.params if isinstance(other, click.Argument) and other is not self]
        word = words[self.name]
        if (
            others
            and isinstance(word, str)
            and not self._names_app(word, [words[other.name] for other in others], others)
        ):
            del words[self.name]
            for other in others:
                following = words[other.name]
                if other.nargs < 0:
                    words[other.name] = (word, *following) if isinstance(following, tuple) else (word,)
                    word = None
                else:
                    words[other.name], word = word, following
            if isinstance(word, str):
                args = [word, *args]
        return super().handle_parse_result(ctx, opts, args)

    @staticmethod
    def _names_app(word: str, following: list[Any], others: list[click.Argument]) -> bool:
        """Whether the first word is an app: it has a colon, and isn't needed as the MODULE:CLASS that comes next."""
        needed = ":" in (others[0].metavar or "") and not isinstance(following[-1], str)
        return ":" in word and not needed


def app_options(command: Callable[..., _T]) -> Callable[..., _T]:
    """Give a command the argument [APP], before its other arguments, and --app. The command receives the path as `app`, or None."""

    @click.argument("app_word", cls=_App, required=False, is_eager=True, metavar="[APP]")
    @click.option(
        "--app", metavar="MODULE:APP", help="The app, if the argument APP is left out.  [default: LEVERET_APP]"
    )
    @functools.wraps(command)
    def with_app(*args: Any, app_word: str | None, app: str | None, **options: Any) -> _T:
        if app_word is not None and app is not None:
            msg = f"the app is given twice: as the argument {app_word} and as --app {app}; leave one out"
            raise click.UsageError(msg)
        return command(*args, app=app_word or app, **options)

    return with_app


def target_options(command: Callable[..., _T]) -> Callable[..., _T]:
    """Give a command the app as `app_options` does, and --broker. The command receives both as `target`, with the app's modules imported."""

    @app_options
    @click.option("--broker", metavar="URL", help="The broker's URL, if there is no app.  [default: LEVERET_BROKER]")
    @functools.wraps(command)
    def with_target(*args: Any, app: str | None, broker: str | None, **options: Any) -> _T:
        return command(*args, target=find_target(app, broker), **options)

    return with_target


def store_options(command: Callable[..., _T]) -> Callable[..., _T]:
    """Give a command the app as `app_options` does, and --store. The command receives the store of either as `target`."""

    @app_options
    @click.option("--store", metavar="URL", help="The job store's URL, if there is no app.  [default: LEVERET_STORE]")
    @functools.wraps(command)
    def with_store(*args: Any, app: str | None, store: str | None, **options: Any) -> _T:
        return command(*args, target=_find_store(app, store), **options)

    return with_store


_NO_STORE_GIVEN = "no job store given; give an app, such as shop:app, as argument, with --app or in LEVERET_APP; or --store URL, or LEVERET_STORE"


def _find_store(app_path: str | None, url: str | None) -> StoreTarget:
    if app_path is not None and url is not None:
        msg = "an app and --store can't be combined: an app has its store"
        raise click.UsageError(msg)
    known = environment(os.environ)
    if url is None and (app_path := app_path or known.app) is not None:
        app = load_app(app_path, modules=False)
        url, runtime = app.store_url(), app.runtime()
    else:
        url = url or known.store or (known.broker if can_store(known.broker) else None)
        runtime = Runtime(app="leveret")
    if not url:
        raise ConfigurationError(NO_STORE if app_path else _NO_STORE_GIVEN)
    open_store(url, runtime)  # a wrong URL is that of a store, and not of a broker
    run(_check_shared(url, runtime))
    return StoreTarget(url, runtime, app_path)


def find_target(app_path: str | None, url: str | None, *, modules: bool = True) -> Target:
    """Return the target that the options give, or else the environment; ConfigurationError if there is none or it can't be used."""
    if app_path is not None and url is not None:
        msg = "an app and --broker can't be combined: an app has its broker"
        raise click.UsageError(msg)
    known = environment(os.environ)
    if url is None and (app_path := app_path or known.app) is not None:
        app = load_app(app_path, modules=modules)
        url, outbox = app.broker_url(), app.outbox_url()
        queues = {handler.queue.name: handler.queue for handler in app.handlers()} if modules else {}
        runtime = app.runtime()
    else:
        app, queues, runtime, outbox = None, {}, Runtime(app="leveret"), None if url else known.outbox
        url = url or known.broker
    if not url:
        msg = f"{NO_BROKER}; or give an app, such as shop:app, as argument, with --app or in LEVERET_APP"
        raise ConfigurationError(msg)
    target = Target(url, runtime, app, queues, outbox)
    run(_check_shared(url, runtime))
    return target


async def _check_shared(url: str, runtime: Runtime) -> None:
    """Refuse a broker that exists only inside one process: here, the process of the command."""
    broker = broker_module(url).open_broker(url, runtime)
    try:
        if not broker.features().shared:
            msg = f"{redact_url(url)} exists only inside the process that opens it, so no command can reach its jobs; use a shared one, such as sqlite://"
            raise ConfigurationError(msg)
    finally:
        await broker.close()


def app_path(given: str | None) -> str:
    """Return the app's path that the command was given, or else LEVERET_APP; a usage error without either."""
    path = given or environment(os.environ).app
    if path is None:
        msg = "no app given; give one, such as shop:app, as argument, with --app or in LEVERET_APP"
        raise click.UsageError(msg)
    return path


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work` on a new event loop."""
    return asyncio.run(work)
