"""Measure what other tools' own code takes from our files: for every family and dialect, whole, in part or not at all.

    python tools/readers READER CHECKOUT [FAMILY …]
    python tools/readers kinds CHECKOUT [FAMILY …]

READER is comfyui, musubi, sd_scripts, ai_toolkit, onetrainer or diffusers (then CHECKOUT is ``-``); CHECKOUT is a clone
of its repository, of which only the code that loads LoRAs runs, on the CPU, with models of their real size but without
weights.  The rows go to ``docs/reference/readers.json``, from which the documentation and a test take them.

``kinds`` prints what ComfyUI takes of each kind of layer: a row per family, dialect and kind, with how many layers of the
file ComfyUI applies right.

Packages that the checkouts import besides these of the extra ``dev``: ``easydict`` for musubi-tuner, ``parse`` for OneTrainer.
"""

import contextlib
import io
import json
import sys
import warnings
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from checkout import commit
from judging import dialects, judge, written

from loramerge.files.architectures import ARCHITECTURES

TABLE = Path(__file__).parents[2] / "docs/reference/readers.json"
NAMES = {
    "comfyui": "ComfyUI", "musubi": "musubi-tuner", "sd_scripts": "sd-scripts", "ai_toolkit": "ai-toolkit",
    "onetrainer": "OneTrainer", "diffusers": "diffusers",
}  # fmt: skip


def verdict(reader: Any, family: str, model: str, dialect: str, folder: Path) -> list[Any] | None:
    """Return how many modules a reader takes of a file with all, of how many, and what is lost; None if none is written.

    Where it stops with an error, it is tried without kernels, then with the blocks alone.
    """
    a, paths, stopped = ARCHITECTURES[family], reader.paths(family, model), ""
    for part in ("all", "matrices", "blocks"):
        file = written(a, dialect, folder, part)
        if file is None:
            return None
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found = reader.read(family, model, file)
        except ImportError:
            raise
        except Exception as error:  # whatever it stops with, it reads nothing
            stopped = f"stops: {type(error).__name__}"
            continue
        taken, modules, lost = judge(a, paths, found)
        return [taken, modules, f"{stopped} at {lost}" if stopped else lost]
    return [0, judge(a, paths, {}).modules, stopped]


def measure(name: str, reader: Any, family: str) -> dict[str, Any]:
    """Return a reader's rows of a family, by model and dialect."""
    rows: dict[str, Any] = {}
    for model in reader.MODELS[family]:
        with TemporaryDirectory() as folder:
            found = {d: verdict(reader, family, model, d, Path(folder)) for d in dialects()}
        rows[model] = {d: v for d, v in found.items() if v}
        print(name, family, model, rows[model], file=sys.stderr, flush=True)
    return {family: rows}


def save(name: str, source: list[str], rows: dict[str, Any]) -> None:
    """Put a reader's rows into the table: a line per reader, family and model."""
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    had = table.get(name, {"rows": {}})
    table[name] = {"source": source, "rows": {f: rows.get(f) or had["rows"].get(f) for f in ARCHITECTURES}}
    lines = [
        f' "{reader}": {{"source": {json.dumps(table[reader]["source"])}, "rows": {{\n'
        + ",\n".join(
            f'  "{f}": {json.dumps(row, ensure_ascii=False)}' for f, row in table[reader]["rows"].items() if row
        )
        + "\n }}"
        for reader in NAMES.values()
        if reader in table
    ]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Run one reader."""
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    name, checkout, *families = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    reader = import_module({"kinds": "comfyui", "diffusers": "pipelines"}.get(name, name))
    reader.open_checkout(Path(checkout))
    if name == "kinds":
        for family in families or reader.TRIED:
            for row in reader.kinds(family):
                print(" | ".join(row), flush=True)
        return
    source = reader.source() if name == "diffusers" else [reader.REPOSITORY, *commit(Path(checkout))]
    for family in families or reader.MODELS:
        save(NAMES[name], source, measure(name, reader, family))


if __name__ == "__main__":
    main()
