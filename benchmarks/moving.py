"""Time what any command has to do: read files, or their headers, and write as many bytes as its output has.

python benchmarks/moving.py OUT --read FILE_OR_FOLDER … --write BYTES
"""

import argparse
import json
import time
from pathlib import Path

from peers.io_only import BUFFER


def main() -> None:
    parser = argparse.ArgumentParser(description="Read files and write one through one buffer, and print the times.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--read", nargs="+", type=Path, required=True)
    parser.add_argument("--write", type=int, default=0, help="write so many bytes")
    parser.add_argument("--headers", action="store_true", help="read and parse headers alone")
    given = parser.parse_args()
    inputs = [file for path in given.read for file in files(path)]
    began, began_cpu = time.perf_counter(), time.process_time()
    read = sum(map(header if given.headers else through, inputs))
    if given.write:
        write(given.out, given.write)
    report = {"run": time.perf_counter() - began, "run_cpu": time.process_time() - began_cpu}
    print("BENCH " + json.dumps({**report, "bytes": read + given.write}))


def files(path: Path) -> list[Path]:
    """Return a file, or the tensors' files in a folder."""
    return [path] if path.is_file() else sorted(path.rglob("*.safetensors"))


def through(path: Path) -> int:
    buffer, total = bytearray(BUFFER), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def header(path: Path) -> int:
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        json.loads(file.read(length))
    return 8 + length


def write(path: Path, size: int) -> None:
    buffer = memoryview(bytearray(BUFFER))
    with path.open("wb", buffering=0) as file:
        while size:
            size -= file.write(buffer[: min(size, BUFFER)])


if __name__ == "__main__":
    main()
