"""``package.module:name``: an object in a module that isn't one of loramerge's own."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import OptionError
from .wording import first_line


def referenced(text: str, noun: str) -> Any:
    """The object that a reference names; its module is imported.

    Args:
        text: ``package.module:name``.
        noun: What the object is, for messages: ``"method"``.

    Raises:
        OptionError: The module can't be imported, or has no such name.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise OptionError(f"Can't read the {noun} {text!r}: wanted package.module:name.")
    found = _imported(module, f"the {noun} {text!r}")
    for part in name.split("."):
        if not hasattr(found, part):
            raise OptionError(f"Can't find the {noun} {text!r}: the module {module} has no {part!r}.")
        found = getattr(found, part)
    return found


def _imported(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        missing = isinstance(error, ModuleNotFoundError)
        reason = first_line(error) if missing else f"{module} raised {type(error).__name__}: {first_line(error)}"
        way_out = "install it, or set PYTHONPATH to the folder that holds it" if missing else f"mend or update {module}"
        raise OptionError(f"Can't import {what}: {reason.rstrip('.')}. Way out: {way_out}.") from error


def reference_of(value: object, module: str) -> str | None:
    """What finds an object again, in the module that made it; None where that holds it under no name."""
    home = sys.modules.get(module)
    if home is None or home.__spec__ is None or module == "__main__":
        return None
    return next((f"{module}:{name}" for name, held in vars(home).items() if held is value), None)


@contextmanager
def from_here() -> Iterator[None]:
    """Modules beside where one stands are found, as Python finds those beside a script."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def code_of(function: Callable[..., Any]) -> str | None:
    """The SHA-256 of the file that defines a function; None where there is none."""
    import hashlib
    import inspect
    from pathlib import Path

    try:
        text = Path(inspect.getsourcefile(function) or "").read_bytes()
    except (OSError, TypeError):
        return None
    return hashlib.sha256(text).hexdigest()
