"""Each room has one face: what it lists is there, and examples and guides use nothing behind it."""

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src/loramerge"
ROOMS = sorted(path.parent for path in SRC.rglob("__init__.py") if "face(" in path.read_text())
GROUND = {f"loramerge.{path.stem}" for path in SRC.glob("[!_]*.py")}
READ = sorted(
    [
        ROOT / "README.md",
        ROOT / "examples/merge.ipynb",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.py"),
    ]
)


def package(folder: Path) -> str:
    return ".".join(folder.relative_to(SRC.parent).parts)


def listed(folder: Path) -> list[str]:
    """The names that a face imports for type checkers."""
    tree = ast.parse((folder / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return sorted(alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names)


@pytest.mark.parametrize("folder", ROOMS, ids=package)
def test_a_face_has_what_type_checkers_are_told_and_nothing_else(folder: Path) -> None:
    module = importlib.import_module(package(folder))
    always = ["__version__", "errors"] if folder == SRC else []

    assert module.__all__ == sorted([*listed(folder), *always])
    assert all(getattr(module, name) is not None for name in module.__all__)


@pytest.mark.parametrize("folder", ROOMS, ids=package)
def test_no_public_name_is_that_of_a_file(folder: Path) -> None:
    files = {path.stem for path in folder.iterdir()} - ({"errors"} if folder == SRC else set())

    assert not files & set(importlib.import_module(package(folder)).__all__)


def test_the_top_has_at_most_sixteen_entries() -> None:
    entries = [path for path in SRC.iterdir() if not path.name.startswith("__") and path.name != "py.typed"]

    assert len(entries) <= 16


def python_in(path: Path) -> Iterator[str]:
    """The Python code of a file: all of it, the blocks of a page, the cells of a notebook."""
    text = path.read_text()
    if path.suffix == ".py":
        yield text
    elif path.suffix == ".ipynb":
        yield from ("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    else:
        yield from re.findall(r"^```(?:python|py)\b[^\n]*\n(.*?)^```", text, re.M | re.S)


def imports(code: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a page may show a part, or leave something out: its imports are whole lines
        tree = ast.parse("\n".join(re.findall(r"^(?:from|import) .*", code, re.M)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loramerge"):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("loramerge."))


@pytest.mark.parametrize("path", READ, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_and_guides_use_faces_only(path: Path) -> None:
    for module, name in [found for code in python_in(path) for found in imports(code)]:
        public = getattr(importlib.import_module(module), "__all__", None)
        assert (module in GROUND and not name.startswith("_")) or name in (public or []), (module, name)


@pytest.mark.parametrize("path", sorted((ROOT / "docs/reference").glob("*.md")), ids=lambda path: path.name)
def test_the_reference_documents_faces_only(path: Path) -> None:
    for found in re.findall(r"^::: (\S+)", path.read_text(), re.M):
        module, _, name = found.rpartition(".")
        assert found in GROUND or name in importlib.import_module(module).__all__, found
