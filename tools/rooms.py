"""Print the rooms of loramerge that a command enters, and the calls from room to room.

    python tools/rooms.py merge person.safetensors jersey.safetensors -o both.safetensors

A room is a package or a file at the top of loramerge.  Only calls of functions count, not imports.  Without arguments two
small LoRAs are made and merged.
"""

import inspect
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from loramerge.cli import main


def room(frame: FrameType) -> tuple[str, str] | None:
    """The room and the module of a function of loramerge; None elsewhere."""
    name = frame.f_globals.get("__name__", "")
    is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED  # a module's or a class's body isn't
    return (name.split(".")[1], name) if is_function and name.startswith("loramerge.") else None


def importing(frame: FrameType | None) -> bool:
    """True if a module is being imported further up."""
    while frame:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


def trace(arguments: list[str]) -> tuple[Counter[str], Counter[tuple[str, str]], set[str]]:
    """Run a command; calls by room, calls by pair of rooms, and the modules that were entered."""
    rooms: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    modules: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not (here := room(frame)) or importing(frame):
            return
        rooms[here[0]] += 1
        modules.add(here[1])
        caller = frame.f_back
        while caller and not (came := room(caller)):
            caller = caller.f_back
        if caller and came and came[0] != here[0]:
            pairs[came[0], here[0]] += 1

    sys.argv = ["loramerge", *arguments]
    sys.setprofile(note)
    try:
        main()
    except SystemExit:
        pass
    finally:
        sys.setprofile(None)
    return rooms, pairs, modules


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        arguments = sys.argv[1:]
        if not arguments:
            import loramerge as lm
            from loramerge.testing import random_lora

            files = [
                str(lm.save(random_lora("sdxl", rank=4, seed=seed), Path(folder) / f"{name}.safetensors"))
                for seed, name in enumerate(("person", "jersey"))
            ]
            arguments = ["merge", *files, "-o", str(Path(folder) / "both.safetensors"), "-j", "1", "--quiet"]
        rooms, pairs, modules = trace(arguments)
    print(f"{len(rooms)} rooms, {len(pairs)} pairs of rooms, {len(modules)} files\n")
    print("| from | to |\n|---|---|")
    for one in rooms:
        to = [there for here, there in pairs if here == one]
        print(f"| {one} | {', '.join(to) or '–'} |")
