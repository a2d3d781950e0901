"""A folder with an app."""

from pathlib import Path

import pytest

from tests.cli.command import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A folder with shop.py and nothing else."""
    return Project(tmp_path)
