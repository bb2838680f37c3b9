"""Every guard holds for its whole class: what it guards is called in the files of this table, and nowhere else.

A new place that reads text, parses JSON, compiles a pattern or prints goes through the door that is there.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "loramerge"

DOORS: dict[str, dict[str, str]] = {
    "json.loads": {
        "files/storage/texts.py": "the door",
        "files/storage/reader.py": "the header of a file, with limits of its own",
        "files/architectures/__init__.py": "the package's own data",
    },
    "json.load": {},
    "json.dumps": {
        "files/storage/texts.py": "the door",
        "files/storage/writer.py": "texts only",
        "files/dialects/config.py": "ranks and texts",
        "files/writing.py": "ranks and texts",
        "files/metadata.py": "texts only",
        "files/lora.py": "what is hashed",
        "checkpoints/rewriting.py": "an index, as it was read",
        "merging/toml.py": "texts only",
        "scoring/encoders.py": "what is hashed",
        "cli/output.py": "what is printed",
    },
    ".read_text": {},
    ".read_bytes": {"registry.py": "code that was imported", "scoring/encoders.py": "the cache's own vectors"},
    "open to read": {
        "files/storage/texts.py": "the door",
        "files/storage/workers.py": "pipes of its own",
        "files/storage/digests.py": "whole files, to be hashed",
        "files/architectures/__init__.py": "the package's own data",
        "scoring/pictures.py": "through open_regular",
    },
    "a pattern that isn't a constant": {
        "files/expressions.py": "the door",
        "files/architectures/hints.py": "words of its own",
        "files/dialects/free.py": "names of its own, escaped",
        "files/dialects/records.py": "marks of its own",
        "files/dialects/repairs.py": "a table of its own",
        "files/hub.py": "a constant of the library's",
        "files/families.py": "blocks of its own",
        "files/storage/reader.py": "a table of its own",
        "files/storage/scratch.py": "names of its own, escaped",
    },
    "print": {"cli/output.py": "the door"},
    "sys.stdout": {"cli/output.py": "the door", "cli/__init__.py": "how characters are encoded"},
    "typer.echo": {},
}
"""What is called, and the files that may, each with its reason."""

PATTERNS = ("compile", "search", "match", "fullmatch", "split", "findall", "finditer", "sub", "subn")


def calls(tree: ast.Module) -> Iterator[str]:
    """The keys of `DOORS` that a module calls."""
    ours = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    ours |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.stdout":
            yield "sys.stdout"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        yield from {name, f".{name.rpartition('.')[2]}" if "." in name else name} & DOORS.keys()
        if (name == "open" and "open" not in ours) or (name.endswith(".open") and is_a_files(node)):
            yield "open to read"
        if name.partition(".")[::2] in {("re", function) for function in PATTERNS} and not is_constant(node.args[0]):
            yield "a pattern that isn't a constant"


def is_a_files(call: ast.Call) -> bool:
    """Whether the method ``open`` is that of a path, which takes a mode; recipes have one too."""
    if call.args:
        return isinstance(call.args[0], ast.Constant) and not str(call.args[0].value).strip("rwxabt+")
    return ast.unparse(call.func) not in ("self.open", "recipe.open")


def is_constant(pattern: ast.expr) -> bool:
    """Whether a pattern is text of the module, or one of its constants."""
    named = isinstance(pattern, ast.Name) and pattern.id.isupper()
    return named or isinstance(pattern, ast.Constant)


FOUND = {
    (str(path.relative_to(SRC)), call) for path in SRC.rglob("*.py") for call in calls(ast.parse(path.read_text()))
}


@pytest.mark.parametrize("door", DOORS)
def test_what_a_guard_is_for_is_called_behind_its_door_alone(door: str) -> None:
    assert {file for file, call in FOUND if call == door} == DOORS[door].keys()


@pytest.mark.parametrize(
    ("code", "door"),
    [
        ("import json\njson.loads(x)", "json.loads"),
        ("Path(x).read_text()", ".read_text"),
        ("(folder / x).read_text(encoding='utf-8')", ".read_text"),
        ("with open(x) as f: f.read()", "open to read"),
        ("path.open()", "open to read"),
        ("path.open('rb')", "open to read"),
        ("re.search(pattern[3:], module)", "a pattern that isn't a constant"),
        ("re.compile(f'{x}')", "a pattern that isn't a constant"),
        ("print(x)", "print"),
        ("sys.stdout.write(x)", "sys.stdout"),
    ],
)
def test_a_call_beside_the_door_is_found(code: str, door: str) -> None:
    assert door in set(calls(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ["re.compile('a+')", "re.search(WORDS, x)", "from .reading import open\nopen(x)", "recipe.open(allow_pickle=True)"],
)
def test_what_is_none_of_the_guards_business_is_left_alone(code: str) -> None:
    assert not set(calls(ast.parse(code)))
