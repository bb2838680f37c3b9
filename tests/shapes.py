"""Checks of the shapes in annotations: ``Float[Array, "out r"]`` is a note in production and a law in the test run.

jaxtyping says whether an array has a shape, beartype looks into tuples and unions.  Their own import hook checks every
call twice, which makes small merges five times as slow; here each combination of shapes and dtypes is checked once.
"""

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args

import jaxtyping
from beartype.door import is_bearable

import loramerge.tensors

NAMES = ("Bool", "Float", "Float32", "Float64")
LEARNED = ("least_squares", "penalties", "problems")
MODULES = ("loramerge.linalg", "loramerge.merging.methods", *(f"loramerge.learned.{name}" for name in LEARNED))


def install() -> None:
    """Have the functions and dataclasses of `MODULES` checked; they must not be imported yet."""
    for name in NAMES:
        setattr(loramerge.tensors, name, getattr(jaxtyping, name))
    sys.meta_path.insert(0, Finder())


class Finder:
    """Finds the modules whose shapes are checked."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not any(name == module or name.startswith(f"{module}.") for module in MODULES):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = Loader(name, spec.origin)
        return spec


class Loader(SourceFileLoader):
    """Decorates every function and class with `checked`, in memory: no bytecode is written."""

    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(self.get_data(self.path), self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                place = len(node.decorator_list) if isinstance(node, ast.FunctionDef) else 0
                node.decorator_list.insert(place, ast.copy_location(ast.Name("_checked", ast.Load()), node))
        return compile(tree, self.path, "exec")

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_checked"] = checked
        super().exec_module(module)


def checked(wanted: Any) -> Any:
    """Check the arguments and the result of a function by its annotations, or the fields of a dataclass."""
    if isinstance(wanted, type):
        if "__dataclass_fields__" in vars(wanted):
            wanted.__init__ = checked(wanted.__init__)
        return wanted
    hints = {name: hint for name, hint in wanted.__annotations__.items() if _has_shape(hint)}
    return _checked(wanted, hints) if hints else wanted


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shape, get_args(hint)))


def _checked(function: Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    seen = set()

    def check(form: Any, values: dict[str, Any]) -> None:
        with jaxtyping.jaxtyped("context"):
            for name, hint in hints.items():
                if name in values and not is_bearable(values[name], hint):
                    raise jaxtyping.TypeCheckError(
                        f"{function.__qualname__}, {name}: wanted {hint}, got {values[name]!r}"
                    )
        seen.add(form)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        form = _form((args, tuple(options.items())))
        if form not in seen:
            check(form, signature.bind(*args, **options).arguments)
        result = function(*args, **options)
        form = (form, _form(result))
        if form not in seen:
            check(form, {**signature.bind(*args, **options).arguments, "return": result})
        return result

    return call


def _form(value: Any) -> Any:
    """All that a check depends on."""
    if isinstance(value, tuple | list):
        return tuple(map(_form, value))
    return (value.shape, value.dtype) if hasattr(value, "ndim") else type(value)
