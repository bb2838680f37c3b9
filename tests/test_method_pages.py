"""The pages of the merge methods: what is read there is what the code says."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from loramerge.merging.methods import METHODS

DOCS = Path(__file__).parents[1] / "docs"
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What writes the tables of the site when it is built."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(hooks: ModuleType) -> str:
    return str(hooks.on_page_markdown((DOCS / "reference" / "methods.md").read_text(encoding="utf-8")))


def section(page: str, name: str) -> str:
    """A method's part of the page."""
    return page.split(f"\n## {name}\n")[1].split("\n## ")[0]


@every_method
def test_a_methods_section_is_its_docstring_with_its_source_and_options(name: str, page: str) -> None:
    method, found = METHODS[name], section(page, name)
    text = (inspect.getdoc(method.function) or "").partition("\n\nRaises:")[0]

    assert text in found
    assert all(part.strip(" ;,") in found for part in re.split(r"https?://\S+|docs/\S+", method.source))
    assert all(f"(../{page})" in found for page in re.findall(r"docs/(\S+)", method.source))
    assert all(url.rstrip(";,") in found for url in re.findall(r"https?://\S+", method.source))
    for option in method.options.values():
        assert f"| `{option.name}` | " in found
        assert f"| `{option.default}` |" in found


@every_method
def test_a_methods_docstring_has_its_formula(name: str) -> None:
    text = inspect.getdoc(METHODS[name].function) or ""

    assert re.search(r"ΔW|τ|upᵢ", text)
    assert re.search(r"Σ[ |]|= ?[Uσwτ√N]|\bsin\b|[PQ] ΔW|ΔWᵢ \(", text), text


def test_which_method_when_speaks_of_every_method_and_shows_what_they_draw() -> None:
    text = (DOCS / "explanation" / "methods.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", text)

    assert [name for name in METHODS if f"`{name}`" not in text] == []
    assert (DOCS / "explanation" / picture).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
