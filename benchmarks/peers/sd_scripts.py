"""Run the merge scripts of kohya's sd-scripts, from a checkout of them.

    python benchmarks/peers/sd_scripts.py OUT FILE FILE --checkout sd-scripts --script flux_merge_lora.py --concat
    python benchmarks/peers/sd_scripts.py OUT FILE FILE --checkout sd-scripts --script svd_merge_lora.py \
        --modules 2 --new_rank 8 --precision float

Options besides --checkout, --script and --modules are the script's.  The scripts import all of the training code, whose
packages (cv2, torchvision, …) a merge never calls: those that aren't installed are replaced by empty ones.  The time is that of the
script's ``merge``, without imports.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import diffusers.utils  # noqa: F401  (asks for torchvision, and must not find the empty one)
import torch
import transformers.utils
from safetensors import safe_open
from safetensors.torch import save_file
from sampling import modules

TRAINING = ("accelerate", "cv2", "einops", "imagesize", "toml", "torchvision", "voluptuous")
"""Packages that only training needs."""
DRAWING = ("library.lpw_stable_diffusion", "library.sdxl_lpw_stable_diffusion")
"""Modules of theirs that draw pictures, and import what newer versions of transformers don't have."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge with sd-scripts and print the times.")
    parser.add_argument("out")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--checkout", type=Path, required=True, help="the repository's folder")
    parser.add_argument("--script", required=True, help="its name in networks/")
    parser.add_argument("--modules", type=int)
    given, options = parser.parse_known_args()
    chosen = list(modules(given.files[0], given.modules))
    transformers.utils.is_torchvision_available()  # remembers the answer, before an empty one can be found
    sys.meta_path.append(_Absent())
    sys.modules.update({name: MagicMock() for name in DRAWING})
    sys.path[:0] = [str(given.checkout), str(given.checkout / "networks")]
    script = _script(given.checkout / "networks" / given.script)
    with tempfile.TemporaryDirectory(dir=Path(given.out).parent) as folder:
        files = [_named(path, chosen, Path(folder, f"{i}.safetensors")) for i, path in enumerate(given.files)]
        ratios = [str(1 / len(files))] * len(files)
        args = script.setup_parser().parse_args(
            ["--models", *files, "--ratios", *ratios, "--save_to", given.out, "--save_precision", "fp16", *options]
        )
        began, began_cpu = time.perf_counter(), time.process_time()
        script.merge(args)
        run, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    found = {"run": run, "run_cpu": cpu, "cpu_ms": 1e3 * cpu / len(chosen), "modules": len(chosen)}
    print("BENCH " + json.dumps(found))


def _script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec, path
    assert spec.loader, path
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def _named(path: str, chosen: list[str], out: Path) -> str:
    """Write the chosen modules under the suffixes that the scripts read, with the alpha that they expect."""
    tensors = {}
    with safe_open(path, "pt") as file:
        for name in chosen:
            theirs = f"lora_unet_{name.replace('.', '_')}"
            for part, suffix in {"A": "down", "B": "up"}.items():
                tensors[f"{theirs}.lora_{suffix}.weight"] = file.get_tensor(f"{name}.lora_{part}.weight")
            rank = tensors[f"{theirs}.lora_down.weight"].shape[0]
            tensors[f"{theirs}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, out)
    return str(out)


class _Absent(MetaPathFinder, Loader):
    """Finds the packages of training that nothing before has found, and leaves them empty."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in TRAINING else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(__spec__=spec, __path__=[], __name__=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


if __name__ == "__main__":
    main()
