"""``loramerge check``: whether files load in another program."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from .._version import __version__
from ..errors import FamilyError, FileError, LayerError, LoRAMergeError, NotALoRAError, NumberError, OptionError
from .options import Arch, Files, Json, Pickle, Quiet, files_of
from .output import explained, more, print_json, say
from .settings import command

if TYPE_CHECKING:
    from ..comparing import Check

NO, UNKNOWN = 1, 3
"""Exit codes."""

MOST = 3
"""Modules that are named for each reason."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of ``loramerge check``."""

    files: Files
    reader: Annotated[
        list[str],
        typer.Option("--for", "-f", help="comfyui, diffusers, a1111, kohya (sd-scripts) or peft; repeatable."),
    ]
    base: Annotated[
        Path | None, typer.Option("--base", help="A base model: which modules fit it, and which don't.")
    ] = None
    json: Json = False
    sarif: Annotated[bool, typer.Option("--sarif", help="For code scanning: SARIF 2.1.0.")] = False
    architecture: Arch = None
    allow_pickle: Pickle = False
    quiet: Quiet = False


@command
def run(given: Options) -> None:
    """Say whether files load in a program: all of it, in part or not, and why. Exit code 0 if all do, 1 if not, 3 if unknown.

    Example: loramerge check person.safetensors --for comfyui
    """
    if given.json and given.sarif:
        raise OptionError("Give --json or --sarif, not both.")
    found = list(_answers(given))
    if given.json:
        print_json([as_data(*answer) for answer in found])
    elif given.sarif:
        print_json(as_sarif(found))
    elif not given.quiet:
        for _, _, each in found:
            if not isinstance(each, LoRAMergeError):
                _say(each)
    for error in dict.fromkeys(each for _, _, each in found if isinstance(each, LoRAMergeError)):
        say(f"Error: {explained(error)}", file=sys.stderr)
    raise typer.Exit(_code([verdict_of(each) for _, _, each in found]))


UNREADABLE = (FileError, NotALoRAError, LayerError, FamilyError, NumberError)
"""Errors that are about one file, and leave the answers for the others as they are."""

Answer = tuple[str, str, "Check | LoRAMergeError"]
"""A file, a reader's title, and what is said of both: an error if the file can't be read."""


def _answers(given: Options) -> Iterator[Answer]:
    """Yield the answer for every file and reader; a file and the base are opened once for all readers."""
    from ..checkpoints.models import open_checkpoint
    from ..comparing.checking import check
    from ..files.dialects.readers import READERS
    from ..files.reading import open

    readers = [READERS[reader].title for reader in given.reader]  # an unknown one is refused before any file is read
    for file in files_of(given.files):
        with ExitStack() as stack:
            try:
                lora = stack.enter_context(open(file, architecture=given.architecture, allow_pickle=given.allow_pickle))
            except UNREADABLE as error:
                yield from ((file, reader, error) for reader in readers)
                continue
            base = stack.enter_context(open_checkpoint(given.base, likely=lora.families)) if given.base else None
            yield from ((file, reader, check(lora, reader, base=base)) for reader in readers)


def verdict_of(found: "Check | LoRAMergeError") -> str:
    """Return the verdict of an answer; ``unreadable`` if the file can't be read."""
    return "unreadable" if isinstance(found, LoRAMergeError) else found.verdict


def _code(verdicts: Sequence[str]) -> int:
    if {*verdicts} & {"no", "in part", "unreadable"}:
        return NO
    return UNKNOWN if "unknown" in verdicts else 0


def _say(found: "Check") -> None:
    say(str(found))
    for finding in found.findings:
        named = ", ".join(finding.modules[:MOST])
        say(f"  {finding.what}: {len(finding.modules)} of {found.layers} layers")
        say(f"    {named} {more(len(finding.modules) - MOST, 'all of them with --json')}".rstrip())
    for reason in found.unknown:
        say(f"  unknown: {reason}")


def as_data(file: str, reader: str, found: "Check | LoRAMergeError") -> dict[str, Any]:
    """Return the answer for a file as plain data."""
    if isinstance(found, LoRAMergeError):
        nothing: dict[str, Any] = {"dialect": "", "families": [], "layers": 0, "ignored": [], "findings": []}
        return {"file": file, "reader": reader, "verdict": verdict_of(found), **nothing, "unknown": [str(found)]}
    return {
        "file": file,
        "reader": found.reader,
        "verdict": found.verdict,
        "dialect": found.dialect,
        "families": list(found.families),
        "layers": found.layers,
        "ignored": list(found.ignored),
        "findings": [{"what": finding.what, "modules": list(finding.modules)} for finding in found.findings],
        "unknown": list(found.unknown),
    }


def as_sarif(found: Sequence[Answer]) -> dict[str, Any]:
    """Return the answers in the format of code scanners.

    Source: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
    """
    results = []
    for file, _, each in found:
        for text, rule, level in _results(each):
            results.append(
                {
                    "ruleId": rule,
                    "level": level,
                    "message": {"text": text},
                    "locations": [{"physicalLocation": {"artifactLocation": {"uri": _uri(file)}}}],
                }
            )
    rules = {
        "ignored": "The reader leaves layers out, or applies them otherwise than they are meant.",
        "unknown": "The reader was not run with such a file.",
        "unreadable": "The file can't be read, or isn't a LoRA.",
    }
    driver = {
        "name": "loramerge check",
        "version": __version__,
        "rules": [{"id": name, "shortDescription": {"text": text}} for name, text in rules.items()],
    }
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _uri(file: str) -> str:
    """Return a file's name as the reference that SARIF wants, in which a space or an umlaut is escaped."""
    return quote(os.fsencode(file if file.startswith("hf://") else Path(file).as_posix()), safe="/:@")


def _results(found: "Check | LoRAMergeError") -> Iterator[tuple[str, str, str]]:
    """Yield what is said of a file, with its rule and level."""
    if isinstance(found, LoRAMergeError):
        yield str(found), "unreadable", "error"
        return
    level = "error" if found.verdict == "no" else "warning"
    for finding in found.findings:
        yield f"{finding.what}: {len(finding.modules)} of {found.layers} layers", "ignored", level
    yield from ((reason, "unknown", "note") for reason in found.unknown)
