"""Which Pythons and which versions of the libraries work: an environment a row, the wheel in it, and the tests.

    pip install uv
    python tools/matrix.py lowest tested newest --python 3.11 --python 3.13
    python tools/matrix.py newest    # every night: says which newest version breaks which adapter

`lowest` is what pyproject.toml allows at least, for the core alone and then with the extras, which ask for newer
versions of some; `tested` is constraints.txt; `newest` is what the registry has.  The exit status is 1 where a test fails.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
LIBRARIES = ("numpy", "safetensors", "huggingface-hub", "torch", "diffusers", "peft", "transformers", "accelerate")
VERSIONS = {
    "lowest": ("--resolution", "lowest-direct"),
    "tested": ("--constraint", "constraints.txt"),
    "newest": ("--upgrade",),
}
EXTRAS = ("--extra", "diffusers", "--extra", "plots", "--extra", "search")
CORE = {
    "core": ["tests/test_merge.py", "tests/test_methods.py", "tests/test_layers.py", "tests/test_files.py"],
    "more": ["tests/test_dialects.py", "tests/test_checkpoints.py", "tests/test_bake.py", "tests/test_recipe.py"],
    "command line": ["tests/test_cli.py"],
    "learned": ["tests/learned/test_ziplora.py", "tests/learned/test_least_squares.py", "tests/learned/test_state.py"],
}
ADAPTERS = {
    "doctor": ["tests/test_doctor.py"],
    "peft": ["tests/oracles/test_peft.py", "tests/oracles/test_peft_methods.py"],
    "diffusers": ["tests/oracles/test_diffusers.py", "tests/adapters/test_generation.py"],
    "base models": ["tests/oracles/test_base_models.py", "tests/adapters/test_models.py"],
    "dinov2": ["tests/adapters/test_real_encoders.py", "tests/adapters/test_scoring.py"],
    "training": ["tests/adapters/test_training.py"],
}


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *what: str) -> None:
        run("uv", "pip", "install", "--quiet", "--python", str(self.python), *what)

    def versions(self) -> dict[str, str]:
        lines = run("uv", "pip", "freeze", "--python", str(self.python)).splitlines()
        found = dict(line.split("==") for line in lines if "==" in line)
        return {name: found[name] for name in LIBRARIES if name in found}

    def test(self, paths: Sequence[str]) -> tuple[int, int, int]:
        """How many tests passed, failed and were skipped."""
        report = self.folder / "report.xml"
        command = [str(self.python), "-m", "pytest", "-p", "no:cacheprovider", f"--junit-xml={report}", *paths]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        (self.folder / f"{Path(paths[0]).stem}.log").write_text(done.stdout, encoding="utf-8")
        if done.returncode > 1:
            print("\n".join(done.stdout.splitlines()[-3:]), flush=True)
            return 0, 1, 0
        suite = ElementTree.parse(report).getroot()[0].attrib
        failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
        for line in re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.MULTILINE):
            print(f"  {line}", flush=True)
        return int(suite["tests"]) - failed - skipped, failed, skipped


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def results(environment: Environment, wheel: str, versions: str) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The groups of tests and how they ended; the extras are installed when the core was tested."""
    environment.install("-r", "pyproject.toml", *VERSIONS[versions])
    environment.install("--no-deps", wheel)
    tools = ("pytest", "hypothesis", "jaxtyping", "beartype", "pillow")
    environment.install(*tools, *(VERSIONS[versions] if versions == "tested" else ()))
    print("  core:", environment.versions(), flush=True)
    for group, paths in CORE.items():
        yield group, environment.test(paths)
    environment.install("-r", "pyproject.toml", *EXTRAS, *VERSIONS[versions])
    environment.install("lycoris-lora")  # what the tests hold base models against
    print("  with extras:", environment.versions(), flush=True)
    for group, paths in ADAPTERS.items():
        yield group, environment.test(paths)


def culprit(environment: Environment, paths: Sequence[str]) -> str:
    """The library without whose newest version a group passes: each goes back to its tested version by itself."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    tested = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for name, version in environment.versions().items():
        if version != tested[name]:
            environment.install(f"{name}=={tested[name]}")
            _, failed, _ = environment.test(paths)
            environment.install(f"{name}=={version}")
            if not failed:
                return f"{name} {version} breaks it, {tested[name]} does not"
    return "no single library's newest version: it fails with each one put back too"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", choices=VERSIONS)
    parser.add_argument("--python", action="append", help="a version or a path, more than once for more rows")
    parser.add_argument("--folder", type=Path, help="keep the environments and the logs of the tests here")
    asked = parser.parse_args()
    folder = (asked.folder or Path(tempfile.mkdtemp())).absolute()
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    run("uv", "build", "--wheel", "--quiet", "--out-dir", str(folder))
    wheel = str(next(folder.glob("*.whl")))
    table, broken = [], []
    for python in asked.python or [sys.executable]:
        for versions in asked.versions:
            row = f"{versions}-{Path(python).name}"
            environment = Environment(folder / row)
            run("uv", "venv", "--quiet", "--clear", "--python", python, str(environment.folder))
            print(f"Python {python}, {versions} versions", flush=True)
            for group, (passed, failed, skipped) in results(environment, wheel, versions):
                line = f"  {group:12} {passed:5} passed {failed:3} failed {skipped:3} skipped"
                print(line, flush=True)
                table.append(f"{row:20} {line}")
                if failed:
                    why = culprit(environment, {**CORE, **ADAPTERS}[group]) if versions == "newest" else ""
                    broken.append(f"Python {python}, {versions}: {group} breaks. {why}")
            if not asked.folder:
                shutil.rmtree(environment.folder)
    print("\n".join(["", *table, "", *(broken or ["nothing breaks"])]))
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
