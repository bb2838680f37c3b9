"""What is guarded in one place has no second door: each call below is made in the files that its row names, and nowhere else."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC, STUDY = ROOT / "src/loramerge", ROOT / "examples/virtual_tryon/study"

DOORS: dict[str, set[str]] = {
    # Text becomes a path once.
    "expanduser": {"files/storage/paths.py"},
    ".home": set(),
    # The process is the user's.
    "umask": set(),
    # Files are written whole, or not at all.
    "open to write": {"files/storage/workers.py"},  # a pipe
    ".write_text": set(),
    ".write_bytes": set(),
    ".savefig": {"comparing/plots.py"},  # into memory
    ".save": {
        "scoring/png.py",
        "files/thumbnails.py",
        "cli/calibrate.py",
        "cli/doctor.py",
        "cli/zip.py",
    },  # into memory; ours
    "save_file": set(),
    "save_pretrained": set(),
    "mkstemp": set(),
    "NamedTemporaryFile": set(),
    "TemporaryDirectory": {"files/storage/scratch.py", "cli/doctor.py"},
    "copytree": {"checkpoints/rewriting.py"},
    # Text of strangers is read, parsed and written in one place.
    "json.load": set(),
    "json.loads": {
        "files/storage/texts.py",
        "files/storage/reader.py",  # a header, within the same limits
        "files/architectures/family.py",  # the package's own data
    },
    "json.dumps": {
        "files/storage/texts.py",
        "files/storage/writer.py",  # a header: texts and sizes
        "files/dialects/config.py",  # texts and ranks
        "files/writing.py",  # the same
        "files/metadata.py",  # texts
        "files/lora.py",  # what is hashed
        "checkpoints/rewriting.py",  # an index as it was read
        "merging/toml.py",  # texts
        "scoring/encoders.py",  # what is hashed
        "cli/output.py",  # what is printed
    },
    ".read_text": set(),
    ".read_bytes": {"registry.py", "scoring/encoders.py"},  # code that was imported; the cache's own vectors
    "open to read": {
        "files/storage/texts.py",
        "files/storage/workers.py",  # pipes of its own
        "files/storage/digests.py",  # files to be hashed
        "files/thumbnails.py",  # a picture
        "files/storage/pickles.py",  # the file that torch opens next
        "files/architectures/family.py",  # the package's own data
        "scoring/pictures.py",  # what open_regular opened
    },
    # The work of a regular expression is bounded.
    "re of no constant": {
        "files/expressions.py",
        "files/renumbering.py",  # names as they are, escaped
        "files/dialects/free.py",  # names of its own, escaped
        "files/dialects/records.py",  # a table of its own
        "files/dialects/readers.py",  # patterns of the table of families
        "files/dialects/repairs.py",  # a table of its own
        "files/hub.py",  # a constant of its own
        "files/families.py",  # blocks of its own
        "files/storage/reader.py",  # a table of its own
        "files/storage/scratch.py",  # names of its own, escaped
    },
    # Every text that is printed is made visible.
    "print": {"cli/output.py", "cli/__init__.py"},  # the latter says what the system says
    "sys.stdout.write": set(),
    "sys.stderr.write": set(),
    "typer.echo": set(),
    "typer.secho": set(),
}
"""The files that may make a call; a call is a function's name, ``module.name``, or ``.name`` for a method."""

PATTERNS = ("compile", "search", "match", "fullmatch", "split", "findall", "finditer", "sub", "subn")


def spelled(call: ast.Call) -> Iterator[str]:
    """The names by which the table may call a call."""
    whole = ast.unparse(call.func)
    name = whole.rpartition(".")[2]
    yield from (whole, name)
    if isinstance(call.func, ast.Attribute):
        yield f".{name}"
    if name in ("open", "fdopen") and set("wax+") & set("".join(modes_of(call))):
        yield "open to write"
    if name == "open" and whole not in ("os.open", "self.open", "recipe.open") and is_reading(call, whole):
        yield "open to read"
    if whole in {f"re.{function}" for function in PATTERNS} and not is_constant(call.args[0]):
        yield "re of no constant"


def modes_of(call: ast.Call) -> list[str]:
    """The arguments that may be the mode of an ``open``."""
    texts = [arg.value for arg in (*call.args, *(k.value for k in call.keywords)) if isinstance(arg, ast.Constant)]
    return [text for text in texts if isinstance(text, str) and text and set(text) <= set("rwaxbt+")]


def is_reading(call: ast.Call, whole: str) -> bool:
    """Whether ``open`` is the built-in one or that of a path, whose first argument is a mode."""
    modes = modes_of(call)
    if set("wax+") & set("".join(modes)):
        return False
    return whole == "open" or not call.args or bool(modes)


def is_constant(pattern: ast.expr) -> bool:
    """Whether a pattern is a text of the module, or has the name of a constant."""
    return isinstance(pattern, ast.Constant) or (isinstance(pattern, ast.Name) and pattern.id.isupper())


def doors(code: str) -> set[str]:
    """The rows of the table that a file's code needs; a function of ours may have the name of a built-in one."""
    tree = ast.parse(code)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    ours = {a.asname or a.name for n in imports for a in n.names}
    ours |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) not in ours]
    return DOORS.keys() & {name for call in calls for name in spelled(call)}


@cache
def doors_of_files() -> dict[str, set[str]]:
    return {path.relative_to(SRC).as_posix(): doors(path.read_text()) for path in SRC.rglob("*.py")}


@pytest.mark.parametrize("door", DOORS)
def test_a_guarded_call_is_made_where_its_guard_is(door: str) -> None:
    found = {name for name, there in doors_of_files().items() if door in there}

    assert found == DOORS[door]


def test_the_study_reads_and_writes_its_state_as_the_library_does() -> None:
    second = {".read_text", ".read_bytes", ".write_bytes", "open to read", "open to write", "json.load"}

    assert {path.name for path in STUDY.glob("*.py") if doors(path.read_text()) & second} == set()


@pytest.mark.parametrize(
    ("code", "door"),
    [
        ("Path(x).expanduser()", "expanduser"),
        ("from os.path import expanduser\nexpanduser(x)", "expanduser"),
        ("Path.home() / x", ".home"),
        ("mask = os.umask(0)", "umask"),
        ("with open(path, 'w') as file: pass", "open to write"),
        ("path.open(mode='ab')", "open to write"),
        ("os.fdopen(fd, 'w')", "open to write"),
        ("path.write_text(x)", ".write_text"),
        ("figure.savefig(path)", ".savefig"),
        ("import json\njson.loads(x)", "json.loads"),
        ("Path(x).read_text()", ".read_text"),
        ("(folder / x).read_text(encoding='utf-8')", ".read_text"),
        ("with open(x) as f: f.read()", "open to read"),
        ("open(x, encoding='utf-8')", "open to read"),
        ("path.open()", "open to read"),
        ("path.open('rb')", "open to read"),
        ("re.search(pattern[3:], module)", "re of no constant"),
        ("re.compile(f'{x}')", "re of no constant"),
        ("print(x)", "print"),
        ("sys.stdout.write(x)", "sys.stdout.write"),
    ],
)
def test_a_second_door_is_found(code: str, door: str) -> None:
    assert door in doors(code)


@pytest.mark.parametrize(
    "code",
    [
        "write_text(path, x)",
        "home(x)",
        "x = 'os.umask()'",
        "re.compile('a+')",
        "re.search(WORDS, x)",
        "from .reading import open\nopen(x)",
        "recipe.open(allow_pickle=True)",
        "lm.open(path)",
        "os.open(path, os.O_RDONLY)",
    ],
)
def test_what_is_no_door_is_none(code: str) -> None:
    assert not doors(code)
