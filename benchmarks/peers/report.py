"""Figures → tables, ratios, the list of what must be reached, and a plot."""

from __future__ import annotations

import importlib
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.peers.contestants import AIO_PIKA, HUEY, LEVERET, NODE, RABBIT, C, Contestant
from benchmarks.peers.measures import UNITS, Unit

LABELS = {"classic": "classic priority", "plain": "classic"}

Rounds = list[dict[str, float] | None]
"""A row a round; None where it was refused."""


class Figures:
    """All rounds of a run."""

    def __init__(self) -> None:
        self.rounds: dict[tuple[str, str, str], Rounds] = {}
        self.refused: dict[tuple[str, str, str], str] = {}

    def __bool__(self) -> bool:
        """Tell whether any round has a figure."""
        return any(row is not None for rounds in self.rounds.values() for row in rounds)

    def add(self, unit: Unit, contestant: Contestant, kind: str, row: dict[str, float] | str) -> None:
        """Add a round's row, or why there is none."""
        key = (unit.name, contestant.name, kind)
        self.rounds.setdefault(key, []).append(None if isinstance(row, str) else row)
        if isinstance(row, str):
            self.refused[key] = row

    def values(self, key: tuple[str, str, str], metric: str) -> list[float]:
        """Return a metric's value in each round that has one."""
        return [row[metric] for row in self.rounds.get(key, []) if row is not None]

    def median(self, key: tuple[str, str, str], metric: str) -> float | None:
        """Return the median, or None where fewer than half of the rounds have a figure."""
        values = self.values(key, metric)
        return statistics.median(values) if values and 2 * len(values) >= len(self.rounds[key]) else None

    def ratio(self, one: tuple[str, str, str], other: tuple[str, str, str], metric: str) -> float | None:
        """Return one / other: the median over the rounds, which is steadier than a ratio of medians."""
        if self.median(one, metric) is None or self.median(other, metric) is None:
            return None
        both = zip(self.rounds[one], self.rounds[other], strict=False)
        ratios = [a[metric] / b[metric] for a, b in both if a is not None and b is not None and b[metric]]
        return statistics.median(ratios) if ratios else None

    def best(self, unit: str, metric: str, *, rising: bool, allow: Callable[[Contestant, str], bool]) -> tuple[str, str, str] | None:
        """Return the key of the best peer, on the queue type that it is faster on."""
        keys = [(unit, peer.name, kind) for peer in RABBIT if peer.peer for kind in peer.kinds if allow(peer, kind)]
        found = {key: value for key in keys if (value := self.median(key, metric)) is not None}
        return (max if rising else min)(found, key=lambda key: found[key]) if found else None

    def as_json(self) -> list[dict[str, Any]]:
        """Return a record a row of the tables."""
        return [
            {"unit": unit, "contestant": name, "kind": kind, "rounds": rounds, "refused": self.refused.get((unit, name, kind))}
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


def _anyone(peer: Contestant, kind: str) -> bool:
    return True


def show(console: Console, figures: Figures) -> None:
    """Print a table a unit: medians with minimum and maximum, and what leveret is to each."""
    for unit in UNITS:
        keys = [key for key in figures.rounds if key[0] == unit.name]
        if not keys:
            continue
        first = next(iter(unit.metrics))
        best = figures.best(unit.name, first, rising=unit.rising, allow=_anyone)
        table = Table(title=unit.name, title_justify="left", title_style="bold")
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
                ours = (unit.name, LEVERET.name, "quorum")
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
    """A line of the list of what must be reached."""

    what: str
    reached: float | None
    bound: float
    at_least: bool
    beside: str

    @property
    def verdict(self) -> str:
        """Say whether it is reached."""
        if self.reached is None:
            return "not measured"
        return "reached" if (self.reached >= self.bound if self.at_least else self.reached <= self.bound) else "MISSED"


def goals(figures: Figures) -> list[Goal]:
    """Return every goal with what was measured."""
    found: list[Goal] = []

    def ours(unit: str, kind: str = "quorum") -> tuple[str, str, str]:
        return unit, LEVERET.name, kind

    def against(what: str, unit: str, other: Contestant, bound: float, kind: str = "quorum", metric: str = "per_s", *, at_least: bool = True) -> None:
        ratio = figures.ratio(ours(unit, kind), (unit, other.name, kind), metric)
        found.append(Goal(what, ratio, bound, at_least, f"× {other.name}"))

    def against_best(
        what: str, unit: str, bound: float, metric: str = "per_s", *, rising: bool = True, allow: Callable[[Contestant, str], bool] = _anyone,
        kind: str = "quorum",
    ) -> None:
        best = figures.best(unit, metric, rising=rising, allow=allow)
        ratio = None if best is None else figures.ratio(ours(unit, kind), best, metric)
        found.append(Goal(what, ratio, bound, rising, "× the best peer" if best is None else f"× {best[1]} ({LABELS.get(best[2], best[2])})"))

    def itself(what: str, unit: str, metric: str, bound: float, kind: str = "quorum", *, at_least: bool = False, beside: str = "") -> None:
        found.append(Goal(what, figures.median(ours(unit, kind), metric), bound, at_least, beside))

    one, many, consume, two = "publish one by one", "publish pipelined", "consume, one process", "consume, two processes"
    against_best("publish pipelined, quorum", many, 8)
    against("publish pipelined, quorum", many, C, 0.7)
    against_best("consume, quorum", consume, 12)
    against("consume, quorum", consume, C, 0.4)
    against("publish pipelined, classic priority", many, C, 0.55, "classic")
    against("consume, classic priority", consume, C, 0.6, "classic")
    for kind in ("quorum", "classic"):
        against(f"publish pipelined, {kind}", many, NODE, 0.9, kind)
        against(f"consume, {kind}", consume, NODE, 1.1, kind)
    itself("CPU µs a published job, quorum", many, "cpu_us", 8)
    against("CPU a published job, quorum", many, AIO_PIKA, 1.0, metric="cpu_us", at_least=False)
    itself("CPU µs a consumed job, quorum", consume, "cpu_us", 15)
    against("CPU a consumed job, quorum", consume, AIO_PIKA, 1.0, metric="cpu_us", at_least=False)
    both = (figures.median(ours(two), "per_s"), figures.median(ours(consume), "per_s"))
    found.append(Goal("consume in two processes, quorum", both[0] / both[1] if both[0] and both[1] else None, 1.5, True, "× one process"))
    against("publish one by one, quorum", one, AIO_PIKA, 1.3)
    for metric in ("p50_ms", "p99_ms"):
        against_best(f"latency at 200/s, {metric[:3]}", "latency at 200/s", 1.0, metric, rising=False)
        against(f"latency at 200/s, {metric[:3]}", "latency at 200/s", C, 1.5, metric=metric, at_least=False)
    against_best(
        "jobs that fail once, delay taken off, quorum", "jobs that fail once", 0.5, "net_s", rising=False, allow=lambda peer, _: peer.real_retry
    )
    for what in ("delayed by 5 s, spread out, lateness", "delayed by 5 s, lateness"):
        for metric in ("p50_ms", "p99_ms"):
            against_best(f"{what} {metric[:3]}", what, 1.0, metric, rising=False, allow=lambda peer, kind: kind in peer.broker_held)
    against_best("idle RSS", "memory", 1.0, "idle_mb", rising=False)
    against_best("import", "import", 1.0, "import_ms", rising=False)
    against("SQLite, publish_many", "SQLite", HUEY, 3, "sqlite", "publish_per_s")
    against("SQLite, consume", "SQLite", HUEY, 3, "sqlite")
    itself("SQLite, publish_many /s", "SQLite", "publish_per_s", 5000, "sqlite", at_least=True)
    itself("SQLite, consume /s", "SQLite", "per_s", 3000, "sqlite", at_least=True)
    return found


def show_goals(console: Console, found: Sequence[Goal]) -> None:
    """Print the list of what must be reached."""
    table = Table(title="what must be reached", title_justify="left", title_style="bold")
    for heading in ("", "reached", "beside", "bound", ""):
        table.add_column(heading, justify="right" if heading in ("reached", "bound") else "left")
    for goal in found:
        if goal.reached is not None:
            table.add_row(goal.what, _short(goal.reached), goal.beside, f"{'≥' if goal.at_least else '≤'} {goal.bound:g}", goal.verdict)
    if table.row_count:
        console.print(table)


def draw(figures: Figures, title: str, path: Path) -> str | None:
    """Draw a bar chart a unit into `path`; return why not, where matplotlib is missing."""
    try:    # by name: the checkers run in environments with it and without
        importlib.import_module("matplotlib").use("svg")
    except ImportError:
        return "no plot: matplotlib isn't here (`make bench` installs it)"
    plt = importlib.import_module("matplotlib.pyplot")

    shown = [key for key in figures.rounds if any(row is not None for row in figures.rounds[key])]
    drawn = [unit for unit in UNITS if any(key[0] == unit.name for key in shown)]
    if not drawn:
        return "no plot: no figures"
    columns = 3
    lines = -(-len(drawn) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 3.4 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for unit, axis in zip(drawn, axes.flat, strict=False):
        metric, heading = next(iter(unit.metrics.items()))
        keys = [key for key in shown if key[0] == unit.name]
        medians = [statistics.median(figures.values(key, metric)) for key in keys]
        low = [median - min(figures.values(key, metric)) for median, key in zip(medians, keys, strict=True)]
        high = [max(figures.values(key, metric)) - median for median, key in zip(medians, keys, strict=True)]
        colours = ["#c2410c" if key[1] == LEVERET.name else "#94a3b8" for key in keys]
        axis.barh(range(len(keys)), medians, xerr=[low, high], color=colours, error_kw={"elinewidth": 1, "ecolor": "#334155"})
        axis.set_yticks(range(len(keys)), [f"{name}, {LABELS.get(kind, kind)}" for _, name, kind in keys], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{unit.name}: {heading} ({'more' if unit.rising else 'less'} is better)", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(textwrap.fill(title, 220), fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return None
