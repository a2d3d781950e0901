"""The project is described in pyproject.toml. Only the README needs code: a package index can't follow its relative links."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
tree = f"{project['urls']['Source']}/blob/v{project['version']}/"


def absolute(link: re.Match[str]) -> str:
    """Return the link into the source of this version."""
    target = link["target"]
    return f"]({tree}{'README.md' if target.startswith('#') else ''}{target})"


readme = Path("README.md").read_text(encoding="utf-8")
setup(
    long_description=re.sub(r"\]\((?!https?://)(?P<target>[^)\s]+)\)", absolute, readme),
    long_description_content_type="text/markdown",
)
