"""The options of commands: declared once in a dataclass, and the LoRAs that a command opens are closed again."""

import ast
import os
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Annotated, get_args

import pytest
import typer
from typer.testing import CliRunner

import loramerge as lm
from loramerge.cli import app as app_module
from loramerge.cli.app import VERBS, app, real
from loramerge.cli.settings import command
from small import small


@dataclass(frozen=True, kw_only=True)
class Shared:
    size: Annotated[int, typer.Option("--size")] = 3
    quiet: Annotated[bool, typer.Option("--quiet")] = False


@dataclass(frozen=True, kw_only=True)
class Own(Shared):
    file: Annotated[str, typer.Argument()]
    size: Annotated[int, typer.Option("--size")] = 5
    names: Annotated[list[str] | None, typer.Option("--name")] = None


@command
def show(given: Own) -> None:
    """Print the options.

    Example: show
    """
    print(given)


def test_a_commands_own_options_come_before_the_shared_ones() -> None:
    assert list(signature(show).parameters) == ["file", "size", "names", "quiet"]


def test_a_command_gets_what_was_typed_as_one_object() -> None:
    app = typer.Typer()
    app.command()(show)

    result = CliRunner().invoke(app, ["a", "--name", "x", "--name", "y", "--quiet"])

    assert result.output == f"{Own(file='a', names=['x', 'y'], quiet=True)}\n"
    assert CliRunner().invoke(app, []).exit_code == 2


@pytest.mark.parametrize("verb", VERBS)
def test_the_list_of_commands_says_what_each_says_of_itself(verb: str) -> None:
    assert real(verb).help.split("\n\n")[0] == VERBS[verb]


def test_a_path_that_no_system_has_is_refused_by_every_option() -> None:
    found = []
    for verb in VERBS:
        for parameter in signature(import_module(f"loramerge.cli.{verb}").run).parameters.values():
            kind, info = get_args(parameter.annotation)
            if Path in (kind, *get_args(kind)):
                found.append(verb)
                with pytest.raises(lm.errors.FileError, match="too long"):
                    info.parser("x" * 300)

    assert {"merge", "score", "generate", "bake"} <= set(found)


def test_no_function_of_the_command_line_has_more_than_twelve_parameters() -> None:
    for path in Path(app_module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert len([*node.args.args, *node.args.kwonlyargs]) <= 12, f"{path.name}: {node.name}"


@pytest.mark.parametrize("verb", ["zip", "calibrate"])
def test_only_a_merge_from_moments_needs_no_base(verb: str) -> None:
    (base,) = [parameter for parameter in real(verb).params if "--base" in parameter.opts]

    assert base.required == (verb == "zip")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="lists the open files of a process as Linux does")
@pytest.mark.parametrize(
    "typed",
    [
        ["merge", "--rank", "max"],
        ["merge", "--exclude", "nothing.has.this.name", "-o", "out"],
        ["merge", "--allow-lossy", "--to", "peft", "-o", "out"],
        ["average", "-o", "out"],
        ["average", "-o", "out.safetensors", "--ema", "sigma=0.1"],
        ["check", "--for", "comfyui"],
        ["check", "--for", "nothing"],
        ["compare"],
        ["compare", "--exclude", "nothing.has.this.name"],
        ["bake", "--base", "missing", "-o", "out"],
        ["diff"],
    ],
)
def test_the_loras_that_a_command_opens_are_closed(
    typed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [str(lm.save(small(seed=seed), tmp_path / f"{seed}.safetensors", dialect="kohya")) for seed in (1, 2)]

    result = CliRunner().invoke(app, [typed[0], *files, *typed[1:]])

    assert result.exit_code != 2
    assert not [name for fd in os.listdir("/proc/self/fd") if (name := _target(fd)).startswith(str(tmp_path))]
    del result  # which holds the frames of an error, and with them the LoRAs


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""
