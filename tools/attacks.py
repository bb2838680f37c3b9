"""Measure the time and memory that every attack takes, each in its own process.

    python tools/attacks.py [PART OF A NAME, OR large]

An attack (`tests/hostile/attacks.py`) is at fault if it is not answered as it says, takes more than two
seconds of CPU time, or more memory than three times its file and 300 MB above what the interpreter and its
libraries took before it was opened.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS, TIMES, MEGABYTES = 2.0, 3, 300

MAKE = "import sys; from hostile.attacks import ATTACKS; import os, pathlib; "
MAKE += "os.write(1, os.fsencode(ATTACKS[sys.argv[1]].make(pathlib.Path(sys.argv[2]))))"
LIST = """
import json
from hostile.attacks import ATTACKS
print(json.dumps({name: [a.refused, a.allow_pickle, a.recipe, a.large] for name, a in ATTACKS.items()}))
"""


def peak() -> float:
    """Return the most memory that this process has had since `reset`, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def opened(path: str, allow_pickle: bool, recipe: bool) -> None:
    """Open, read everything, compute every ΔW's factors, and write what can be written."""
    import loramerge as lm
    from loramerge.merging.recipe import Recipe

    if recipe:
        Recipe.read(path).plan()
        return
    lora = lm.load(path, allow_pickle=allow_pickle)
    for layer in lora.values():
        layer.factors()
    with tempfile.TemporaryDirectory() as folder:
        lm.save(lora, Path(folder) / "x.safetensors")


def child(path: str, allow_pickle: bool, recipe: bool) -> None:
    import loramerge as lm
    import loramerge.files.reading
    import loramerge.merging.recipe

    if allow_pickle:
        import torch  # noqa: F401
    reset()
    before, began, said = peak(), time.process_time(), ""
    try:
        opened(path, allow_pickle, recipe)
    except lm.errors.LoRAMergeError as error:
        said = str(error)
    print(json.dumps({"seconds": time.process_time() - began, "megabytes": peak() - before, "said": said}))


def measured(name: str, flags: list[bool]) -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(
            [sys.executable, "-c", MAKE, name, folder], env=environment, capture_output=True, check=True
        )
        path = os.fsdecode(made.stdout)
        size = sum(file.stat().st_size for file in (Path(path), *Path(path).rglob("*")) if file.is_file()) / 1e6
        words = [sys.executable, __file__, "--child", json.dumps([path, *flags])]
        found = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
        exploded = any(Path(folder).rglob("exploded"))
    if found.returncode:
        return {"problem": found.stderr.strip().splitlines()[-1:], "size": size, "seconds": 0.0, "megabytes": 0.0}
    return {**json.loads(found.stdout), "size": size, "problem": "it ran code" if exploded else ""}


def judged(row: dict[str, object], refused: str | None) -> object:
    import re

    if row["problem"]:
        return row["problem"]
    if bool(row["said"]) != (refused is not None) or not re.search(refused or "", str(row["said"])):
        return f"answered {str(row['said'])[:120]!r}, expected {refused!r}"
    if row["seconds"] > SECONDS:  # type: ignore[operator]
        return "too slow"
    return "too much memory" if row["megabytes"] > TIMES * row["size"] + MEGABYTES else ""  # type: ignore[operator]


def main() -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    listed = subprocess.run([sys.executable, "-c", LIST], env=environment, capture_output=True, text=True, check=True)
    bad, rows = 0, []
    wanted = sys.argv[1] if sys.argv[1:] else ""
    for name, (refused, allow_pickle, recipe, large) in json.loads(listed.stdout).items():
        if wanted not in name and not (wanted == "large" and large):
            continue
        row = measured(name, [allow_pickle, recipe])
        problem = judged(row, refused)
        bad += bool(problem)
        rows.append(row)
        print(
            f"{name:55} {row['size']:8.2f} MB  {row['seconds']:6.2f} s  {row['megabytes']:7.1f} MB  {problem}",
            flush=True,
        )
    slowest, largest = max(r["seconds"] for r in rows), max(r["megabytes"] for r in rows)  # type: ignore[type-var]
    print(f"{len(rows)} attacks, {bad} at fault; at most {slowest:.2f} s of CPU time and {largest:.0f} MB more.")
    sys.exit(bool(bad))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*json.loads(sys.argv[2]))
    else:
        main()
