"""What a worker says of an app that can't be imported: one line that names the user's line."""

import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from leveret.errors import ConfigurationError
from leveret.process.loading import load_app

DJANGO = "site-packages/django/core/exceptions.py"
MODELS = "site-packages/django/models.py"
APP = "from leveret import App\napp = App('s', broker='memory://', modules=['handlers'])\n"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Write]:
    """Write files of a project, whose folder is the working directory, with a folder of installed packages in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def failed(path: str = "app:app") -> str:
    with pytest.raises(ConfigurationError) as failed:
        load_app(path)
    return str(failed.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("\nimport nothing_of_the_kind\n", "No module named 'nothing_of_the_kind' ({}, line 2)"),
        ("\n\nnothing_of_the_kind\n", "NameError: name 'nothing_of_the_kind' is not defined ({}, line 3)"),
        ("from leveret import gone\n", "({}, line 1)"),
        ("import json\njson.loads('{')\n", "({}, line 2)"),
        ("import other\nother.fail()\n", "KeyError: 'x' ({}, line 2)"),
        (
            "from leveret import App\nApp('')\n",
            "an app's name must be a str of 1 to 64 characters, not '' ({}, line 2)",
        ),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_the_deepest_line_of_the_user_is_named(write: Write, source: str, said: str, listed: bool) -> None:
    """The last line of a traceback lies in a library; a user looks for the own line that called the library."""
    name = "handlers.py" if listed else "app.py"
    folder = write(**{"app.py": APP, name: source, "site-packages/other.py": "def fail():\n    return {}['x']\n"})

    assert failed().endswith(said.format(folder / name))


def test_a_listed_module_that_does_not_exist_is_named_with_the_list(write: Write) -> None:
    """A typo in modules= is another mistake than a package that isn't installed."""
    write(**{"app.py": APP})

    assert failed() == "app 's': modules lists 'handlers', which can't be imported: No module named 'handlers'"


def test_a_project_that_is_installed_is_the_users_code_too(write: Write) -> None:
    """In a container the project itself lies among the installed packages."""
    folder = write(
        **{
            "site-packages/shop/__init__.py": "",
            "site-packages/shop/app.py": "import other\nother.fail()\n",
            "site-packages/other.py": "def fail():\n    return {}['x']\n",
        }
    )

    assert failed("shop.app:app").endswith(f"({folder}/site-packages/shop/app.py, line 2)")


@pytest.mark.parametrize("error", ["AppRegistryNotReady", "ImproperlyConfigured"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_django_project_without_its_setup_is_told_where_and_what_to_call(
    write: Write, error: str, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Django's own text says nothing of django.setup(), and its line lies in Django."""
    for module in [module for module in sys.modules if module.partition(".")[0] == "django"]:
        monkeypatch.delitem(sys.modules, module)  # the real one, which another test has imported
    name = "handlers.py" if listed else "app.py"
    folder = write(
        **{
            "app.py": APP,
            name: "import os\nfrom django import models\n",
            "site-packages/django/__init__.py": "",
            "site-packages/django/core/__init__.py": "",
            DJANGO: f"class {error}(Exception): ...\n",
            MODELS: f"from django.core.exceptions import {error}\nraise {error}('not yet')\n",
        }
    )

    assert failed().endswith(
        f"{error}: not yet ({folder / name}, line 2); in a Django project, set DJANGO_SETTINGS_MODULE and call "
        "django.setup() before anything imports models"
    )
