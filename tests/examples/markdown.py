"""The code in README.md and docs/, as the tests run it."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block, and the comment just before it: `<!-- file: shop.py -->` or `<!-- excerpt of: examples/x.py -->`."""

    page: Path
    line: int
    language: str
    comment: str
    text: str

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of `page`, in order."""
    source = page.read_text(encoding="utf-8")
    found = re.finditer(
        r"(?:^<!-- (?P<comment>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", source, re.MULTILINE | re.DOTALL
    )
    return [
        Block(
            page,
            source[: match.start("text")].count("\n") + 1,
            match["language"],
            match["comment"] or "",
            match["text"],
        )
        for match in found
    ]


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
[SHOP] = [block for block in PYTHON if block.comment == "file: shop.py"]
