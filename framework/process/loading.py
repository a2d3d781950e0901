"""Loading the app that module:attribute names."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from ..app import App
from ..errors import ConfigurationError, LeveretError
from ..texts import is_ours


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
    except LeveretError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            msg = f"{path!r}: no module {missing!r} in {os.getcwd()} or among the installed packages"  # noqa: PTH109
        else:
            msg = f"{path!r}: importing {module_name} failed: {error}{_where(error)}"
        raise ConfigurationError(msg) from error
    except (Exception, SystemExit) as error:
        msg = f"{path!r}: importing {module_name} failed: {_said(error)}{_where(error)}"
        raise ConfigurationError(msg) from error


def _said(error: BaseException) -> str:
    """Return an import's error in words."""
    if isinstance(error, SystemExit):
        return f"a module called sys.exit({'' if error.code is None else repr(error.code)}) while it was imported"
    return f"{type(error).__name__}: {error}"


def _where(error: BaseException) -> str:
    """Return the user's line that raised, past the frames of leveret and of the import machinery."""
    if isinstance(error, SyntaxError):  # the message already names the line
        return ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    own = [frame for frame in frames if not is_ours(frame.filename)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def load_app(path: str, *, modules: bool = True) -> App[Any]:
    """Return the app at `path`, module:attribute; with `modules`, also import the modules in the app's `modules=`."""
    app = load(path, "app")
    if not isinstance(app, App):
        msg = f"{path!r} is {type(app).__name__}, not an App"
        raise ConfigurationError(msg)
    if modules:
        try:
            app.import_modules()
        except LeveretError:
            raise
        except (Exception, SystemExit) as error:
            msg = f"{path!r}: importing the app's modules failed: {_said(error)}{_where(error)}"
            raise ConfigurationError(msg) from error
    return app  # pyright: ignore[reportUnknownVariableType]
