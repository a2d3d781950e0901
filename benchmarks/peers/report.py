"""Figures → tables, ratios, the list of what must be reached, and a plot."""

from __future__ import annotations

import importlib
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.peers.contestants import (
    AIO_PIKA,
    CELERY,
    CONTESTANTS,
    HUEY,
    LEVERET,
    NODE,
    PGQUEUER,
    POSTGRESQL,
    PROCRASTINATE,
    RABBITMQ,
    REDIS,
    SAQ,
    TASKIQ,
    C,
    Contestant,
    Server,
)
from benchmarks.peers.measures import UNITS, Unit, entrants

_METRICS = {unit.name: unit.metrics for unit in UNITS}
LABELS = {
    "classic": "classic priority",
    "plain": "classic",
    "sqlite": "SQLite",
    "postgresql": "PostgreSQL",
    "redis": "Redis",
}

Key = tuple[str, str, str]
"""A row of a table: unit, contestant and kind of queue."""
Rounds = list[dict[str, float] | None]
"""A row a round; None where it was refused."""
Allow = Callable[[Contestant, str], bool]
"""Which peers count, with which queue types."""


class Figures:
    """All rounds of a run."""

    def __init__(self) -> None:
        self.rounds: dict[Key, Rounds] = {}
        self.refused: dict[Key, str] = {}

    def __bool__(self) -> bool:
        """Tell whether any round has a figure."""
        return any(row is not None for rounds in self.rounds.values() for row in rounds)

    def add(self, unit: Unit, contestant: Contestant, kind: str, row: dict[str, float] | str) -> None:
        """Add a round's row, or why there is none."""
        key = (unit.name, contestant.name, kind)
        self.rounds.setdefault(key, []).append(None if isinstance(row, str) else row)
        if isinstance(row, str):
            self.refused[key] = row

    def values(self, key: Key, metric: str) -> list[float]:
        """Return a metric's value in each round that has one."""
        return [row[metric] for row in self.rounds.get(key, []) if row is not None]

    def median(self, key: Key, metric: str) -> float | None:
        """Return the median, or None where fewer than half of the rounds have a figure."""
        values = self.values(key, metric)
        return statistics.median(values) if values and 2 * len(values) >= len(self.rounds[key]) else None

    def ratio(self, one: Key, other: Key, metric: str) -> float | None:
        """Return one / other: the median over the rounds, which is steadier than a ratio of medians."""
        if self.median(one, metric) is None or self.median(other, metric) is None:
            return None
        both = zip(self.rounds[one], self.rounds[other], strict=False)
        ratios = [a[metric] / b[metric] for a, b in both if a is not None and b is not None and b[metric]]
        return statistics.median(ratios) if ratios else None

    def best(self, unit: str, metric: str, *, rising: bool, allow: Allow) -> Key | None:
        """Return the key of the best peer, on the queue type that it is faster on."""
        keys = [
            (unit, peer.name, kind) for peer in CONTESTANTS if peer.peer for kind in peer.kinds if allow(peer, kind)
        ]
        found = {key: value for key in keys if (value := self.median(key, metric)) is not None}
        return (max if rising else min)(found, key=lambda key: found[key]) if found else None

    def lacking(self, unit: str, metric: str, allow: Allow) -> str:
        """Return which peers and queue types have no figure, so that the best of the others may not be the best: ", on quorum only", ", without Celery"."""
        (found,) = (one for one in UNITS if one.name == unit)
        all_of_them = [(peer.name, kind) for peer, kind in entrants(found) if peer.peer and allow(peer, kind)]
        there = [(name, kind) for name, kind in all_of_them if self.median((unit, name, kind), metric) is not None]
        names, kinds = {name for name, _ in there}, {kind for _, kind in there}
        absent = [pair for pair in all_of_them if pair not in there]
        unseen = {
            kind for name, kind in absent if name in names
        } - kinds  # nobody was measured on it, and some who were could have been
        only = f", on {' and '.join(LABELS.get(kind, kind) for kind in sorted(kinds))} only" if unseen else ""
        rest = dict.fromkeys(
            f"{name} ({LABELS.get(kind, kind)})" if name in names else name
            for name, kind in absent
            if kind not in unseen
        )
        return only + (f", without {', '.join(rest)}" if rest else "")

    def as_json(self) -> list[dict[str, Any]]:
        """Return a record a row of the tables."""
        return [
            {
                "unit": unit,
                "contestant": name,
                "kind": kind,
                "rounds": rounds,
                "refused": self.refused.get((unit, name, kind)),
            }
            for (unit, name, kind), rounds in self.rounds.items()
        ]

    @classmethod
    def of_json(cls, rows: Sequence[dict[str, Any]]) -> Figures:
        """Return what `as_json` gave."""
        figures = cls()
        for row in rows:
            key = (row["unit"], row["contestant"], row["kind"])
            figures.rounds[key] = row["rounds"]
            if row["refused"]:
                figures.refused[key] = row["refused"]
        return figures


def _on(server: Server) -> Allow:
    """Return which peers count on a server: no contestant is compared with one on another."""
    return lambda _, kind: kind in server.kinds


def tables(figures: Figures) -> list[tuple[str, Unit, Server, list[Key]]]:
    """Return a title, what is measured, where, and the rows of each table: one a unit and server."""
    every = [
        (
            unit.name if server == unit.servers[0] else f"{unit.name}, {server.name}",
            unit,
            server,
            [key for key in figures.rounds if key[0] == unit.name and key[2] in server.kinds],
        )
        for unit in UNITS
        for server in unit.servers
    ]
    return [table for table in every if table[3]]


def show(console: Console, figures: Figures) -> None:
    """Print a table a unit and server: medians with minimum and maximum, and what leveret is to each."""
    for title, unit, server, keys in tables(figures):
        first = next(iter(unit.metrics))
        best = figures.best(unit.name, first, rising=unit.rising, allow=_on(server))
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("")
        table.add_column("queue")
        for heading in unit.metrics.values():
            table.add_column(heading, justify="right")
        table.add_column("leveret beside it", justify="right")
        if best is not None:
            table.add_column("it beside the best peer", justify="right")
        for key in keys:
            _, name, kind = key
            if key in figures.refused:
                count = figures.rounds[key].count(None)
                said = f"{count} of {len(figures.rounds[key])} rounds have no figure: {name}, {kind}, {unit.name}: {figures.refused[key]}"
                console.print(said, highlight=False, markup=False, style="red")
            if figures.median(key, first) is None:
                continue
            cells: list[str] = []
            for metric in unit.metrics:
                values = figures.values(key, metric)
                spread = f" ({_short(min(values))}–{_short(max(values))})" if len(values) > 1 else ""
                cells.append(f"{_short(statistics.median(values))}{spread}")
            ours = (unit.name, LEVERET.name, kind)
            if ours not in figures.rounds:
                ours = (unit.name, LEVERET.name, server.kinds[0])
            cells.append(_times(figures.ratio(ours, key, first) if key != ours else None, unit.compared))
            if best is not None:
                cells.append("the best" if key == best else _times(figures.ratio(key, best, first), unit.compared))
            table.add_row(name, LABELS.get(kind, kind), *cells)
        console.print(table)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _times(ratio: float | None, compared: str) -> str:
    return "" if ratio is None else f"{ratio:.2f} × {compared}"


class Goal(NamedTuple):
    """A row of the list of what was to be reached, here and in docs/performance.md."""

    what: str
    reached: float | None
    beside: str
    bound: float
    at_least: bool

    @property
    def verdict(self) -> str:
        """Say whether it is reached."""
        if self.reached is None:
            return "not measured"
        return "reached" if (self.reached >= self.bound if self.at_least else self.reached <= self.bound) else "MISSED"

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """The row as it is printed."""
        reached = "–" if self.reached is None else _beside(self.reached, self.bound)
        return self.what, reached, self.beside, f"{'≥' if self.at_least else '≤'} {self.bound:,g}", self.verdict


def _beside(value: float, bound: float) -> str:
    """Return the value with as many digits as show on which side of the bound it is."""
    digits = 3 if bound < 0.2 else 2
    while value != bound and round(value, digits) == bound:
        digits += 1
    return (
        f"{value:,.0f}"
        if abs(value) >= 100
        else f"{value:.1f}"
        if abs(value) >= 10 and round(value, 1) != bound
        else f"{value:.{digits}f}"
    )


class Goals:
    """Collects goals for leveret on one kind of queue. Best peers are those that `allow` allows."""

    def __init__(self, figures: Figures, kind: str, allow: Allow) -> None:
        self.found: list[Goal] = []
        self._figures = figures
        self._kind = kind
        self._allow = allow

    def ours(self, unit: str, kind: str = "") -> Key:
        """Return the row of leveret."""
        return unit, LEVERET.name, kind or self._kind

    def against(
        self,
        what: str,
        unit: str,
        other: Contestant,
        bound: float,
        kind: str = "",
        metric: str = "per_s",
        *,
        at_least: bool = True,
    ) -> None:
        """Compare with another on the same kind of queue."""
        ratio = self._figures.ratio(self.ours(unit, kind), (unit, other.name, kind or self._kind), metric)
        self.found.append(Goal(what, ratio, f"× {other.name}", bound, at_least))

    def against_best(
        self,
        what: str,
        unit: str,
        bound: float,
        metric: str = "per_s",
        *,
        rising: bool = True,
        allow: Allow | None = None,
    ) -> None:
        """Compare with the best peer, on the kind of queue on which that is better."""
        allow = allow or self._allow
        best = self._figures.best(unit, metric, rising=rising, allow=allow)
        if best is None:
            self.found.append(Goal(what, None, "× the best peer", bound, rising))
            return
        where = f" ({LABELS.get(best[2], best[2])})" if self._kind in RABBITMQ.kinds else ""
        beside = f"× {best[1]}{where}{self._figures.lacking(unit, metric, allow)}"
        self.found.append(Goal(what, self._figures.ratio(self.ours(unit), best, metric), beside, bound, rising))

    def itself(
        self, what: str, unit: str, metric: str, bound: float, kind: str = "", *, at_least: bool = False
    ) -> None:
        """Compare with nobody."""
        self.found.append(Goal(what, self._figures.median(self.ours(unit, kind), metric), "", bound, at_least))

    def memory(self, bound: float) -> None:
        """Compare with leveret's own worker on RabbitMQ, in MB."""
        for metric, when in (("idle_mb", "idle"), ("after_mb", "after many jobs")):
            here, there = (self._figures.median(self.ours("memory", kind), metric) for kind in ("", "quorum"))
            more = here - there if here is not None and there is not None else None
            self.found.append(Goal(f"memory of a worker, {when}, MB", more, "above RabbitMQ's", bound, at_least=False))


def goals(figures: Figures) -> list[Goal]:
    """Return every goal on RabbitMQ and SQLite with what was measured."""
    rows = Goals(figures, "quorum", _on(RABBITMQ))
    ours, against, against_best, itself, found = rows.ours, rows.against, rows.against_best, rows.itself, rows.found
    one, many, consume, two = (
        "publish one by one",
        "publish pipelined",
        "consume, one process",
        "consume, two processes",
    )
    for what, best, c, c_classic, node in ((many, 8, 0.7, 0.55, 0.9), (consume, 12, 0.4, 0.6, 1.1)):
        against_best(f"{what}, quorum", what, best)
        against(f"{what}, quorum", what, C, c)
        against(f"{what}, quorum", what, NODE, node)
        against(f"{what}, classic priority", what, C, c_classic, "classic")
        against(f"{what}, classic priority", what, NODE, node, "classic")
    for what, unit, most in (("a published job, quorum", many, 8), ("a consumed job, quorum", consume, 15)):
        itself(f"CPU µs of {what}", unit, "cpu_us", most)
        against(
            f"CPU of {what}", unit, AIO_PIKA, round(most / 90, 3), metric="cpu_us", at_least=False
        )  # on the machine that it was hoped for on it takes 90
    both = (figures.median(ours(two), "per_s"), figures.median(ours(consume), "per_s"))
    found.append(
        Goal(f"{two}, quorum", both[0] / both[1] if both[0] and both[1] else None, "× one process", 1.5, at_least=True)
    )
    against(f"{one}, quorum", one, AIO_PIKA, 1.3)
    for metric in ("p50_ms", "p99_ms"):
        against_best(f"latency at 200/s, {metric[:3]}", "latency at 200/s", 1.0, metric, rising=False)
        against(f"latency at 200/s, {metric[:3]}", "latency at 200/s", C, 1.5, metric=metric, at_least=False)
    against_best(
        "jobs that fail once, delay taken off",
        "jobs that fail once",
        0.5,
        "net_s",
        rising=False,
        allow=lambda peer, _: peer.real_retry,
    )
    for what in ("delayed by 5 s, spread out, lateness", "delayed by 5 s, lateness"):
        for metric in ("p50_ms", "p99_ms"):
            against_best(
                f"{what} {metric[:3]}",
                what,
                1.0,
                metric,
                rising=False,
                allow=lambda peer, kind: kind in peer.broker_held,
            )
    against_best("idle memory of a worker", "memory", 1.0, "idle_mb", rising=False)
    against_best("import of the app and its broker", "import", 1.0, "import_ms", rising=False)
    against("SQLite, publish_many", "SQLite", HUEY, 3, "sqlite", "publish_per_s")
    against("SQLite, consume", "SQLite", HUEY, 3, "sqlite")
    itself("SQLite, publish_many /s", "SQLite", "publish_per_s", 5000, "sqlite", at_least=True)
    itself("SQLite, consume /s", "SQLite", "per_s", 3000, "sqlite", at_least=True)
    found.append(
        Goal(
            "MB that 100 000 jobs with failures leave",
            None,
            "tests/fault/test_memory.py asserts it",
            5,
            at_least=False,
        )
    )
    return found


def goals_on_postgresql(figures: Figures) -> list[Goal]:
    """Return every goal on PostgreSQL with what was measured."""
    rows = Goals(figures, POSTGRESQL.kinds[0], _on(POSTGRESQL))
    many, work, one = "publish pipelined", "consume, one process", "publish one by one"
    rows.against("consume", work, PGQUEUER, 2)
    rows.against("CPU of a consumed job", work, PGQUEUER, 0.4, metric="cpu_us", at_least=False)
    for peer in (SAQ, PROCRASTINATE):
        rows.against("consume", work, peer, 15)
    rows.against("publish_many", many, PGQUEUER, 1.2)
    for peer in (SAQ, PROCRASTINATE):
        rows.against("publish_many", many, peer, 4)
    rows.against_best(one, one, 1)
    for metric in ("p50_ms", "p99_ms"):
        rows.against_best(f"latency at 200/s, {metric[:3]}", "latency at 200/s", 1, metric, rising=False)
    rows.memory(8)
    rows.itself("relay of an outbox", "relay of an outbox", "share", 0.5, at_least=True)
    rows.found[-1] = rows.found[-1]._replace(beside="× publish_many to the same RabbitMQ")
    return rows.found


def goals_on_redis(figures: Figures) -> list[Goal]:
    """Return every goal on Redis with what was measured, as a broker and as the store beside RabbitMQ."""
    rows = Goals(figures, REDIS.kinds[0], _on(REDIS))
    many, work = "publish pipelined", "consume, one process"
    rows.against_best("publish_many", many, 5)
    rows.against_best("consume", work, 8)
    for metric in ("p50_ms", "p99_ms"):
        rows.against_best(f"latency at 200/s, {metric[:3]}", "latency at 200/s", 1, metric, rising=False)
    awaited, kept = "a result awaited one by one, on Redis", "jobs with results, kept by Redis"
    for metric in ("p50_ms", "p99_ms"):
        rows.against(f"a result, {metric[:3]}", awaited, SAQ, 1, metric=metric, at_least=False)
    for peer in (TASKIQ, CELERY):
        rows.against("jobs with results, RabbitMQ quorum", kept, peer, 5, RABBITMQ.kinds[0])
    rows.memory(12)
    return rows.found


def show_beside(console: Console, figures: Figures) -> None:
    """Print the contestants on PostgreSQL and on Redis as docs/performance.md has them."""
    _beside_on(console, figures, POSTGRESQL, _COLUMNS)
    _beside_on(console, figures, REDIS, _COLUMNS | _COLUMNS_ON_REDIS)


_COLUMNS = {
    "one by one /s": ("publish one by one", "{per_s}"),
    "publish_many /s (CPU µs)": ("publish pipelined", "{per_s} ({cpu_us})"),
    "consumed, one process /s (CPU µs)": ("consume, one process", "{per_s} ({cpu_us})"),
    "latency at 200/s, p50 / p99 ms": ("latency at 200/s", "{p50_ms} / {p99_ms}"),
    "idle MB / after many jobs": ("memory", "{idle_mb} / {after_mb}"),
}
_COLUMNS_ON_REDIS = {
    "consumed, two /s": ("consume, two processes", "{per_s}"),
    "a result, p50 / p99 ms": ("a result awaited one by one, on Redis", "{p50_ms} / {p99_ms}"),
}


def _beside_on(console: Console, figures: Figures, server: Server, columns: dict[str, tuple[str, str]]) -> None:
    """Print the contestants on a server: a row each, medians."""
    kind = server.kinds[0]
    title = f"Beside its peers on {server.name}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.MARKDOWN)
    for heading in ("", *columns):
        table.add_column(heading)
    for contestant in CONTESTANTS:
        cells: list[str] = []
        for unit, text in columns.values():
            key = unit, contestant.name, kind
            medians = {metric: figures.median(key, metric) for metric in _METRICS[unit]}
            known = {metric: _short(median) for metric, median in medians.items() if median is not None}
            cells.append(text.format(**known) if known else "–")
        if contestant.server == server and any(cell != "–" for cell in cells):
            table.add_row(contestant.name, *cells)
    if table.row_count > 1:
        console.print(table)


def show_goals(console: Console, figures: Figures) -> None:
    """Print the lists of what was to be reached, as docs/performance.md has them."""
    _list(console, figures, "What was to be reached", goals(figures), RABBITMQ)
    _list(console, figures, "What was to be reached on PostgreSQL", goals_on_postgresql(figures), POSTGRESQL)
    _list(console, figures, "What was to be reached on Redis", goals_on_redis(figures), REDIS)


def _list(console: Console, figures: Figures, title: str, every: list[Goal], server: Server) -> None:
    """Print the goals of a server; without a peer there only what was measured."""
    peers = {peer.name for peer in CONTESTANTS if peer.peer and peer.server == server}
    rows = (
        every
        if any(name in peers and kind in server.kinds for _, name, kind in figures.rounds)
        else [goal for goal in every if goal.reached is not None]
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.MARKDOWN)
    for heading in ("leveret", "reached", "beside", "hoped for", "verdict"):
        table.add_column(heading, justify="right" if heading in ("reached", "hoped for") else "left")
    for goal in rows:
        table.add_row(*goal.cells)
    if rows:
        console.print(table)
        if len(rows) < len(every):
            console.print(
                f"{len(every) - len(rows)} more goals need what wasn't measured here: `make bench-peers` measures all",
                highlight=False,
                markup=False,
            )


def draw(figures: Figures, title: str, path: Path) -> str | None:
    """Draw a bar chart a unit into `path`; return why not, where matplotlib is missing."""
    try:  # by name: the checkers run in environments with it and without
        importlib.import_module("matplotlib").use("svg")
    except ImportError:
        return "no plot: matplotlib isn't here (`make bench` installs it)"
    plt = importlib.import_module("matplotlib.pyplot")

    shown = [key for key in figures.rounds if any(row is not None for row in figures.rounds[key])]
    drawn = [table for table in tables(figures) if any(key in shown for key in table[3])]
    if not drawn:
        return "no plot: no figures"
    columns = 3
    lines = -(-len(drawn) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 3.4 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for (name, unit, _, rows), axis in zip(drawn, axes.flat, strict=False):
        metric, heading = next(iter(unit.metrics.items()))
        keys = [key for key in rows if key in shown]
        medians = [statistics.median(figures.values(key, metric)) for key in keys]
        low = [median - min(figures.values(key, metric)) for median, key in zip(medians, keys, strict=True)]
        high = [max(figures.values(key, metric)) - median for median, key in zip(medians, keys, strict=True)]
        colours = ["#c2410c" if key[1] == LEVERET.name else "#94a3b8" for key in keys]
        axis.barh(
            range(len(keys)), medians, xerr=[low, high], color=colours, error_kw={"elinewidth": 1, "ecolor": "#334155"}
        )
        axis.set_yticks(range(len(keys)), [f"{who}, {LABELS.get(kind, kind)}" for _, who, kind in keys], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{name}: {heading} ({'more' if unit.rising else 'less'} is better)", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(textwrap.fill(title, 220), fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return None
