"""What is measured, what it must be, and whether it is."""

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Figure:
    """One measured figure. With `at_most` or `at_least` it has a verdict; a `timed` one says as much of the machine as of leveret."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    timed: bool = True

    @property
    def held(self) -> bool:
        """Whether it is what it must be."""
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    def __str__(self) -> str:
        goal = ""
        if self.at_most is not None:
            goal = f"at most {self.at_most:g}"
        elif self.at_least is not None:
            goal = f"at least {self.at_least:g}"
        verdict = "" if not goal else ("held" if self.held else "MISSED")
        return f"{self.name:66} {self.value:12,.2f} {self.unit:7} {goal:16} {verdict}".rstrip()


@dataclass
class Report:
    """The figures so far, printed as they come."""

    figures: list[Figure] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        """Keep and print a figure."""
        self.figures.append(figure)
        print(figure, flush=True)

    def missed(self, *, timed: bool) -> list[str]:
        """Return the names of the figures that aren't what they must be; those that are `timed` only if asked for."""
        return [one.name for one in self.figures if not one.held and (timed or not one.timed)]

    def rows(self) -> list[dict[str, object]]:
        """Return the figures for a JSON file."""
        return [{**asdict(one), "held": one.held} for one in self.figures]


def percentile(values: list[float], part: float) -> float:
    """Return the value that `part` of the values don't exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]
