"""Measure the floor of any merge: read the inputs, write a file of the result's size, compute nothing.

    python benchmarks/peers/io_only.py OUT FILE FILE … --by raw

``torch`` and ``numpy`` load every input with safetensors and save tensors that were loaded;
``raw`` moves bytes through one buffer.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

BUFFER = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Read LoRAs and write one, and print the times.")
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--by", choices=["raw", "numpy", "torch"], default="torch")
    parser.add_argument("--all", action="store_true", help="write the tensors of all inputs: a concatenation's bytes")
    given = parser.parse_args()
    copy = {"raw": _raw, "numpy": _by_numpy, "torch": _by_torch}[given.by]()
    began, began_cpu = time.perf_counter(), time.process_time()
    copy(given.files, given.out, len(given.files) if given.all else 1)
    report = {"run": time.perf_counter() - began, "run_cpu": time.process_time() - began_cpu}
    print("BENCH " + json.dumps(report))


def _raw() -> Any:
    def copy(files: list[Path], out: Path, written: int) -> None:
        buffer = memoryview(bytearray(BUFFER))
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        left = sum(os.path.getsize(path) for path in files[:written])
        with out.open("wb", buffering=0) as file:
            while left:
                left -= file.write(buffer[: min(left, BUFFER)])

    return copy


def _by_numpy() -> Any:
    from safetensors.numpy import load_file, save_file

    def copy(files: list[Path], out: Path, written: int) -> None:
        loaded = [load_file(path) for path in files]
        save_file(_together(loaded[:written]), out)

    return copy


def _by_torch() -> Any:
    from safetensors.torch import load_file, save_file

    def copy(files: list[Path], out: Path, written: int) -> None:
        loaded = [load_file(path) for path in files]
        for tensors in loaded[written:]:
            _touch(tensors)
        save_file(_together(loaded[:written]), out)

    return copy


def _touch(tensors: dict[str, Any]) -> None:
    # load_file maps the file; without this, inputs that aren't saved would never be read.
    for tensor in tensors.values():
        tensor.view(-1)[::2048].sum()


def _together(loaded: list[dict[str, Any]]) -> dict[str, Any]:
    return {f"{i}.{key}": tensor for i, tensors in enumerate(loaded) for key, tensor in tensors.items()}


if __name__ == "__main__":
    main()
