"""``loramerge doctor``: the versions and devices of an installation, and a merge that checks it."""

import platform
import sys
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from .._version import __version__
from ..errors import FileError, first_line
from .output import print_json, say, table

TOLERANCE = 1e-6
"""Largest relative error at which the self-test's merge counts as right."""
EXTRAS = {
    "torch": "--device, pickles",
    "diffusers": "train, zip, calibrate, generate, score",
    "plots": "compare --heatmap, coefficients --plot",
    "search": "weights by score with CMA-ES",
    "ui": "the page",
}
"""The commands that need each optional extra."""


def run(json: Annotated[bool, typer.Option("--json", help="For programs, and for bug reports.")] = False) -> None:
    """Check this installation: versions, devices, optional extras, and a merge that is checked against dense algebra.

    Exit code 1 if something that the core needs is missing or too old, or the merge is wrong.

    Example: loramerge doctor
    """
    found = examined()
    if json:
        print_json(found)
    else:
        _show(found)
    raise typer.Exit(0 if healthy(found) else 1)


def examined() -> dict[str, Any]:
    """Return everything that the command reports."""
    packages = _packages()
    return {
        "loramerge": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "extras": {
            name: all(p["status"] == "ok" for p in packages if p["needed_by"] == name)
            for name in dict.fromkeys(p["needed_by"] for p in packages if p["needed_by"] != "core")
        },
        "devices": _devices(),
        "largest_error": self_test(),
    }


def healthy(found: dict[str, Any]) -> bool:
    """Return whether the core's packages are installed and its merge is right."""
    core = all(p["status"] == "ok" for p in found["packages"] if p["needed_by"] == "core")
    return core and found["largest_error"] <= TOLERANCE


def _packages() -> list[dict[str, str]]:
    """Return every requirement of the core and of the extras, with the version that is installed.

    Raises:
        FileError: loramerge itself was not installed, so that nobody says what it requires.
    """
    from packaging.requirements import Requirement

    try:
        requirements = metadata.requires("loramerge") or []
    except metadata.PackageNotFoundError:
        raise FileError(
            f"loramerge is imported from {Path(__file__).parents[1]}, and was not installed. Way out: pip install -c "
            "constraints.txt . in its checkout."
        ) from None
    rows = []
    for text in requirements:
        requirement = Requirement(text)
        for part in ("core", *EXTRAS):
            if requirement.marker is None and part != "core":
                continue
            if requirement.marker and (part == "core" or not requirement.marker.evaluate({"extra": part})):
                continue
            rows.append(_package(requirement, part))
    return rows


def _package(requirement: Any, part: str) -> dict[str, str]:
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        installed, status = "–", "missing"
    else:
        status = "ok" if requirement.specifier.contains(installed, prereleases=True) else "too old or too new"
    return {
        "name": requirement.name,
        "wanted": str(requirement.specifier),
        "installed": installed,
        "needed_by": part,
        "status": status,
    }


def _devices() -> list[str]:
    """Return the devices that ``--device`` can name."""
    if find_spec("torch") is None:
        return ["cpu (numpy)"]
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:  # libraries of its own are missing, or of another version
        return [f"cpu (numpy); torch can't be imported: {type(error).__name__}: {first_line(error)}"]

    found = [f"cpu ({torch.get_num_threads()} threads for torch)"]
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def self_test() -> float:
    """Merge LoRAs of two dialects, write a third dialect, read it, and return the largest relative error."""
    import loramerge as lm

    from ..testing import random_lora, relative_error, weighted_sum

    weights = (0.7, -0.5)
    parents = [random_lora("sdxl", rank=4, alpha=2.0, seed=1), random_lora("sdxl", rank=8, alpha=12.0, seed=2)]
    with tempfile.TemporaryDirectory() as folder:
        dialects = ("kohya", "diffusers-peft")
        files = [
            lm.save(parent, Path(folder) / f"{dialect}.safetensors", dialect=dialect)
            for parent, dialect in zip(parents, dialects, strict=True)
        ]
        merged = lm.merge([lm.load(file) for file in files], weights=list(weights))
        both = lm.load(lm.save(merged, Path(folder) / "both.safetensors", dialect="comfyui"))
    return max(relative_error(both[module].delta(), weighted_sum(parents, weights, module)) for module in parents[0])


def _show(found: dict[str, Any]) -> None:
    say(f"loramerge {found['loramerge']}, Python {found['python']} ({sys.executable})", found["system"], "")
    columns = ("name", "wanted", "installed", "needed_by", "status")
    say(
        table(["package", "wanted", "installed", "needed by", ""], [[p[c] for c in columns] for p in found["packages"]])
    )
    say("")
    for name, there in found["extras"].items():
        way = "ready" if there else f"not ready: pip install 'loramerge[{name}]'"
        say(f"extra {name}: {way} ({EXTRAS[name]})")
    for device in found["devices"]:
        say(f"device {device}")
    right = found["largest_error"] <= TOLERANCE
    say(
        "",
        f"Self-test: 0.7 × kohya − 0.5 × diffusers → comfyui, largest relative error {found['largest_error']:.1e}: "
        + ("right." if right else f"WRONG, wanted {TOLERANCE:.0e} at most. Please report this output."),
    )
