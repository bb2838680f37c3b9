"""Inject faults at random moments into commands that write files: afterwards the output is complete, old or new.

    python tools/faults.py --each 5 --seed 0

For every command and every kind of fault: there is the output of an earlier run, the command is run
again on other inputs, and the fault is injected while it works.  Then the output is the earlier run's or
the new one's, byte for byte; what is half written is removed (after a kill -9, after which no code runs,
by the next run); and running the command again gives the new run's bytes.  A training and a study
may leave the state that they go on from, until they are done.
"""

import argparse
import ctypes
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

import loramerge as lm
from loramerge.testing import random_lora

ROOT = Path(__file__).parents[1]
PR_CAPBSET_DROP, OVERRIDES = 24, (1, 2)
"""The call by which a process drops a capability, and those by which root ignores permissions."""

RECIPE = """[[loras]]
path = "a.safetensors"
weight = 0.7
[[loras]]
path = "b.safetensors"
weight = 0.5
"""

BASE_FILE = "base/unet/diffusion_pytorch_model.safetensors"

STUDY = """
base = { model = "./sdxl" }
scorer = { model = "./dinov2" }
data = { source = "folders", folder = "photos" }
training = { rank = 2, steps = 2, resolution = 16 }
drawing = { steps = 1, seeds = 2 }
prompts = { study = ["A psq-person, wearing a barca24_jersey."] }
concepts = [
  { name = "profile", identifier = "psq-person" },
  { name = "barca", identifier = "barca24_jersey" },
]
mixed = [{ name = "profile_mixed", own = "profile", other = "barca", borrowed = 3 }]
settings = [
  { name = "none" },
  { name = "barca", loras = ["barca"] },
  { name = "l2", loras = ["profile_mixed", "barca"], weights = "l2" },
]
"""


def prepare(folder: Path, seed: int) -> None:
    """Write LoRAs, a recipe and a base model into a folder: the same seed gives the same bytes."""

    def chosen(module: str, shape: tuple[int, ...]) -> bool:
        return module.startswith("unet.down_blocks.1.attentions.0") and ".attn" in module

    for name, number in (("a", seed), ("b", seed + 1)):
        lora = random_lora("sdxl", rank=64, alpha=4.0, seed=number, dtype="float16", only=chosen)
        lm.save(lora, folder / f"{name}.safetensors", dialect="kohya")
        shapes = {module: layer.shape for module, layer in lora.layouts.items()}
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "base" / "unet").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    weights = {f"{m.removeprefix('unet.')}.weight": rng.standard_normal(s, np.float32) for m, s in shapes.items()}
    safetensors.numpy.save_file(
        {key: weight.astype(np.float16) for key, weight in weights.items()},
        folder / BASE_FILE,
    )


def prepare_to_learn(folder: Path, seed: int) -> None:
    """Write a tiny SDXL, a tiny DINOv2, and captioned pictures of two concepts."""
    sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "adapters")]
    import tiny

    from adapters import toys
    from loramerge.scoring.quiet import silence

    silence("diffusers", "transformers")
    tiny.pipeline("sdxl").save_pretrained(folder / "sdxl")
    toys.dinov2(folder / "dinov2")
    for name, prompt in zip(("profile", "barca"), tiny.PROMPTS, strict=True):
        tiny.images(folder / "photos" / name, prompt, count=4, seed=seed + len(name))
    (folder / "study.toml").write_text(STUDY)


@dataclass(frozen=True)
class Command:
    """A command that writes below ``out/``, and the input that may disappear from under it."""

    words: tuple[str, ...]
    """The arguments, from the module's name on."""
    input: str = "a.safetensors"
    prepare: Callable[[Path, int], None] = prepare
    resumes: bool = False
    """True if finished files of an earlier run are kept: the output is then a directory of several files."""
    new: bool = False
    """True if it refuses to overwrite an earlier run's output."""
    state: tuple[str, ...] = ()
    """Names of what it may leave to go on from, until it is done."""

    def passing(self, path: str) -> bool:
        """Return whether a file below ``out/`` doesn't belong to the output."""
        return ".part" in path or any(fnmatch(path, name) for name in self.state)


def ours(*words: str, **options: Any) -> Command:
    return Command(("loramerge", *words), **options)


MODEL = "sdxl/unet/diffusion_pytorch_model.safetensors"
TRAIN = ("train", "photos/profile", "-b", "sdxl", "-o", "out/person.safetensors", "--device", "cpu", "-q")
STEPS = ("--rank", "2", "--steps", "60", "--every", "2")
RUN = ("examples.virtual_tryon", "run", "--protocol", "study.toml", "--out", "out", "--device", "cpu")
COMMANDS = {
    "merge": ours("merge", "a.safetensors", "b.safetensors", "-o", "out/both.safetensors", "--rank", "8"),
    "merge by processes": ours("merge", "a.safetensors", "b.safetensors", "-o", "out/both.safetensors", "-j", "2"),
    "convert": ours("convert", "a.safetensors", "-o", "out/a.safetensors", "--to", "diffusers"),
    "convert to PEFT": ours("convert", "a.safetensors", "-o", "out/a", "--to", "peft"),
    "resize": ours("resize", "a.safetensors", "-o", "out/a.safetensors", "--max-error", "30%"),
    "bake into a file": ours("bake", "a.safetensors", "-b", BASE_FILE, "-o", "out/model.safetensors"),
    "bake into a directory": ours("bake", "a.safetensors", "-b", "base", "-o", "out/model", new=True),
    "sweep": ours(
        *("sweep", "recipe.toml", "-s", "rank=2,4,6", "-o", "out/sweep"), resumes=True, state=("sweep/sweep.*",)
    ),
    "train": ours(*TRAIN, *STEPS, input=MODEL, prepare=prepare_to_learn, state=("*.state.safetensors",)),
    "study": Command(RUN, input=MODEL, prepare=prepare_to_learn, resumes=True, state=("*.checkpoint", "sets/*")),
}


def started(
    words: tuple[str, ...], folder: Path, *, largest: int | None = None, obedient: bool = False
) -> "subprocess.Popen[str]":
    def limited() -> None:
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        if obedient:
            for capability in OVERRIDES:
                ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)

    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited,
        env={**os.environ, "HOME": str(folder), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"},
    )


def run(words: tuple[str, ...], folder: Path) -> float:
    """Run a command to its end; return how long it took."""
    began = time.monotonic()
    process = started(words, folder)
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: {said}")
    return time.monotonic() - began


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def litter(folder: Path) -> list[str]:
    return [
        os.path.join(place, name)
        for place, folders, files in os.walk(folder)
        for name in folders + files
        if name.endswith(".part")
    ]


@dataclass
class Trial:
    """A command in a folder, with the earlier output and the expected one."""

    command: Command
    folder: Path
    before: dict[str, str]
    after: dict[str, str]
    seconds: float
    largest: int
    """Size of the largest file that it writes, in bytes."""
    chance: random.Random

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def wait(self, process: "subprocess.Popen[str]") -> None:
        """Wait for a random moment: mostly one at which something is half written."""
        if self.chance.random() < 0.7:
            while process.poll() is None and not litter(self.out):
                time.sleep(0.001)
            time.sleep(self.chance.random() * 0.5 * self.seconds * self.chance.random())
        else:
            time.sleep(self.chance.random() * self.seconds)


def signalled(number: signal.Signals) -> Callable[[Trial], str]:
    def inject(trial: Trial) -> str:
        process = started(trial.command.words, trial.folder)
        trial.wait(process)
        process.send_signal(number)
        return process.communicate()[1]

    return inject


def full_disk(trial: Trial) -> str:
    """Limit the length of files to a part of what is needed."""
    process = started(trial.command.words, trial.folder, largest=int(trial.chance.random() * trial.largest))
    return process.communicate()[1]


def read_only(trial: Trial) -> str:
    """Make the target read-only; root, who can write to anything, drops that capability."""
    directories = [trial.out, *(path for path in trial.out.rglob("*") if path.is_dir())]
    for directory in directories:
        directory.chmod(0o555)
    process = started(trial.command.words, trial.folder, obedient=True)
    said = process.communicate()[1]
    for directory in directories:
        directory.chmod(0o755)
    return said


def vanishing(how: Callable[[Path], object]) -> Callable[[Trial], str]:
    def inject(trial: Trial) -> str:
        path = trial.folder / trial.command.input
        process = started(trial.command.words, trial.folder)
        trial.wait(process)
        how(path)
        return process.communicate()[1]

    return inject


FAULTS: dict[str, Callable[[Trial], str]] = {
    "kill -9": signalled(signal.SIGKILL),
    "SIGTERM": signalled(signal.SIGTERM),
    "SIGHUP": signalled(signal.SIGHUP),
    "SIGINT": signalled(signal.SIGINT),
    "full disk": full_disk,
    "read-only target": read_only,
    "input removed": vanishing(Path.unlink),
    "input cut": vanishing(lambda path: os.truncate(path, path.stat().st_size // 2)),
}


def problems(trial: Trial, name: str, said: str) -> Iterator[str]:
    """Return what is wrong after a fault, and after the run that follows it."""
    left = litter(trial.out)
    if left and name != "kill -9":
        yield f"litter: {left}"
    found = {path: value for path, value in contents(trial.out).items() if not trial.command.passing(path)}
    if trial.command.resumes:
        wrong = [path for path, value in found.items() if value not in (trial.before.get(path), trial.after.get(path))]
        if wrong:
            yield f"not whole: {wrong}"
    elif found not in (trial.before, trial.after):
        yield "neither the earlier output nor the new one"
    if "Traceback" in said and name != "kill -9":
        yield f"no clear error: {said.strip().splitlines()[-1][:200]}"


def attempted(name: str, fault: str, folder: Path, states: Path, seconds: float, chance: random.Random) -> list[str]:
    """Inject one fault, check, run the command again, and check that."""
    command = COMMANDS[name]
    fresh(folder, states)
    largest = max(path.stat().st_size for path in (states / "after").rglob("*") if path.is_file())
    before, after = (contents(states / which) for which in ("before", "after"))
    trial = Trial(command, folder, before, after, seconds, largest, chance)
    said = FAULTS[fault](trial)
    found = list(problems(trial, fault, said))
    shutil.copytree(states / "inputs", folder, dirs_exist_ok=True)
    if not (command.new and (folder / "out" / "model").exists()):
        run(command.words, folder)
    last = contents(trial.out)
    others = [path for path in {**last, **trial.after} if last.get(path) != trial.after.get(path)]
    if others or litter(trial.out):
        found.append(f"the run after it gives other bytes, or leaves the litter: {others or litter(trial.out)}")
    return found


def fresh(folder: Path, states: Path) -> None:
    """Put the new inputs and the earlier run's output in place."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(states / "inputs", folder)
    shutil.copytree(states / "before", folder / "out", dirs_exist_ok=True)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)


def states_of(command: Command, place: Path, work: Path) -> float:
    """Make the outputs of a run on other inputs and of one on the inputs; return how long one takes.

    They run where the trials will: a picture says which base model it was drawn with.
    """
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)
    place.mkdir()
    for name, seed in (("before", 10), ("after", 20)):
        work.mkdir()
        command.prepare(work, seed)
        (work / "out").mkdir()
        if name == "after":
            shutil.copytree(work, place / "inputs")
        seconds = run(command.words, work)
        if name == "before" and command.new:
            shutil.rmtree(work / "out")
            (work / "out").mkdir()
        (work / "out").rename(place / name)
        shutil.rmtree(work)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=4, help="faults of each kind for each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(COMMANDS), help="names of commands")
    parser.add_argument("--kinds", nargs="*", default=list(FAULTS), help="names of faults")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    done: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        for name in options.only:
            seconds = states_of(COMMANDS[name], Path(place) / "states", Path(place) / "work")
            for fault in options.kinds:
                for _ in range(options.each):
                    found = attempted(name, fault, Path(place) / "work", Path(place) / "states", seconds, chance)
                    done[fault] += 1
                    wrong += [f"{name}, {fault}: {problem}" for problem in found]
                    print(f"{name}, {fault}: {found or 'well'}", flush=True)
            print(f"{name}: {sum(done.values())} faults so far, {len(wrong)} problems", flush=True)
    print("\n".join(wrong))
    print(
        f"{sum(done.values())} faults ({', '.join(f'{n} {fault}' for fault, n in done.items())}), {len(wrong)} problems."
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
