"""Loading the app that module:attribute names."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ..app import App
from ..errors import ConfigurationError, LeveretError
from ..job import Job
from ..texts import is_ours

_STANDARD = os.path.join(os.path.dirname(os.__file__), "")  # noqa: PTH118, PTH120 - a worker needs no pathlib
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
"""In the paths of installed packages; on many systems these lie in the folder of the standard library."""


def load(path: str, what: str) -> Any:
    """Import `path`, module:attribute, from the working directory or the installed packages.

    Raises ConfigurationError, which names the missing module or attribute.
    """
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        msg = f"expected module:{what}, such as shop:{what}, not {path!r}"
        raise ConfigurationError(msg)
    try:
        here = os.getcwd()  # noqa: PTH109 - a worker needs no pathlib
    except FileNotFoundError:
        msg = f"{path!r}: the working directory was deleted; change to another one and start again"
        raise ConfigurationError(msg) from None
    if here not in sys.path:
        sys.path.insert(0, here)
    module = _import(module_name, path)
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            import difflib

            close = difflib.get_close_matches(name, [known for known in dir(found) if not known.startswith("_")], 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            msg = f"{path!r}: module {module_name} has no {attribute!r}{hint}"
            raise ConfigurationError(msg)
        found = getattr(found, name)
    return found


def _import(module_name: str, path: str) -> ModuleType:
    """Import a user's module; any error it raises becomes one line that names the source line."""
    try:
        return importlib.import_module(module_name)
    except ConfigurationError as error:
        msg = f"{error}{_where(error, [module_name])}"
        raise ConfigurationError(msg) from error
    except LeveretError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            msg = f"{path!r}: no module {missing!r} in {os.getcwd()} or among the installed packages"  # noqa: PTH109
        else:
            msg = f"{path!r}: importing {module_name} failed: {error}{_where(error, [module_name])}"
        raise ConfigurationError(msg) from error
    except (Exception, SystemExit) as error:
        msg = f"{path!r}: importing {module_name} failed: {_said(error, [module_name])}"
        raise ConfigurationError(msg) from error


def _said(error: BaseException, modules: Sequence[str]) -> str:
    """Return an import's error in words, with the user's line that raised."""
    if isinstance(error, SystemExit):
        said = f"a module called sys.exit({'' if error.code is None else repr(error.code)}) while it was imported"
    else:
        said = f"{type(error).__name__}: {error}"
    return f"{said}{_where(error, modules)}{_hint(error)}"


def _where(error: BaseException, modules: Sequence[str]) -> str:
    """Return the user's line that raised: the deepest line outside of installed packages, or in the package of `modules`."""
    if isinstance(error, SyntaxError):  # the message already names the line
        return ""
    packages = {module.partition(".")[0] for module in modules}
    deepest = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file, package = frame.f_code.co_filename, frame.f_globals.get("__name__", "").partition(".")[0]
        others = file.startswith(("<", _STANDARD)) or is_ours(file) or any(folder in file for folder in _INSTALLED)
        if package in packages or not others:
            deepest = f" ({file}, line {line})"
    return deepest


def _hint(error: BaseException) -> str:
    kind = type(error)
    if kind.__module__ == "django.core.exceptions" and kind.__name__ in {"AppRegistryNotReady", "ImproperlyConfigured"}:
        return (
            "; in a Django project, set DJANGO_SETTINGS_MODULE and call django.setup() before anything imports models"
        )
    return ""


def load_app(path: str, *, modules: bool = True) -> App[Any]:
    """Return the app at `path`, module:attribute; with `modules`, also import the modules in the app's `modules=`."""
    app = load(path, "app")
    if not isinstance(app, App):
        if inspect.isclass(app) and issubclass(app, Job):
            msg = f"{path!r} is a Job class; name the App, such as {path.partition(':')[0]}:app"
        else:
            msg = f"{path!r} is {type(app).__name__}, not an App"
        raise ConfigurationError(msg)
    if modules:
        names = [path.partition(":")[0], *app.modules]
        try:
            app.import_modules()
        except ConfigurationError as error:
            msg = f"{error}{_where(error, names)}"
            raise ConfigurationError(msg) from error
        except LeveretError:
            raise
        except (Exception, SystemExit) as error:
            msg = f"{path!r}: importing the app's modules failed: {_said(error, names)}"
            raise ConfigurationError(msg) from error
    return app  # pyright: ignore[reportUnknownVariableType]
