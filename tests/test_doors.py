"""What is guarded in one place has no second door: each call below is made in the files that its row names, and nowhere else."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src/loramerge"

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
    ".save": {"scoring/png.py", "cli/calibrate.py", "cli/doctor.py", "cli/zip.py"},  # into memory; ours
    "save_file": set(),
    "save_pretrained": set(),
    "mkstemp": set(),
    "NamedTemporaryFile": set(),
    "TemporaryDirectory": {"files/storage/scratch.py", "cli/doctor.py"},
    "copytree": {"checkpoints/rewriting.py"},
}
"""The files that may make a call; a call is a function's name, or ``.name`` for a method."""


def spelled(call: ast.Call) -> Iterator[str]:
    """The names by which the table may call a call."""
    name = ast.unparse(call.func).rpartition(".")[2]
    yield name
    if isinstance(call.func, ast.Attribute):
        yield f".{name}"
    texts = [arg.value for arg in (*call.args, *(k.value for k in call.keywords)) if isinstance(arg, ast.Constant)]
    modes = [text for text in texts if isinstance(text, str) and set(text) <= set("rwaxbt+")]
    if name in ("open", "fdopen") and any(set(mode) & set("wax+") for mode in modes):
        yield "open to write"


def doors(code: str) -> set[str]:
    """The rows of the table that a file's code needs."""
    calls = [name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) for name in spelled(node)]
    return DOORS.keys() & set(calls)


@pytest.mark.parametrize("door", DOORS)
def test_a_guarded_call_is_made_where_its_guard_is(door: str) -> None:
    found = {path.relative_to(SRC).as_posix() for path in SRC.rglob("*.py") if door in doors(path.read_text())}

    assert found == DOORS[door]


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
    ],
)
def test_a_second_door_is_found(code: str, door: str) -> None:
    assert door in doors(code)


@pytest.mark.parametrize("code", ["open(path)", "open(fd, 'rb')", "write_text(path, x)", "home(x)", "x = 'os.umask()'"])
def test_what_is_no_door_is_none(code: str) -> None:
    assert not doors(code)
