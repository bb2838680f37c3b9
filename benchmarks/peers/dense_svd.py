"""Merge to a given rank in the plain way: form ΔW in float32, take torch's SVD of it.

python benchmarks/peers/dense_svd.py OUT FILE FILE … --rank 8 --modules 10
"""

import argparse
import json
import time

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sampling import modules
from torch import Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge with dense SVDs and print the times.")
    parser.add_argument("out")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--modules", type=int)
    given = parser.parse_args()
    chosen = modules(given.files[0], given.modules)
    began, began_cpu = time.perf_counter(), time.process_time()
    merged = {}
    for module in chosen:
        up, down = truncate(delta(given.files, module), given.rank)
        merged[f"{module}.lora_A.weight"] = down.half().contiguous()
        merged[f"{module}.lora_B.weight"] = up.half().contiguous()
    save_file(merged, given.out)
    report = {"run": time.perf_counter() - began, "run_cpu": time.process_time() - began_cpu, "modules": len(chosen)}
    print("BENCH " + json.dumps(report))


def delta(files: list[str], module: str) -> Tensor:
    """Return the mean of the LoRAs' ΔW."""
    total = torch.zeros(())
    for path in files:
        with safe_open(path, "pt") as file:
            up, down = (file.get_tensor(f"{module}.lora_{part}.weight").float() for part in "BA")
        total = total + up @ down / len(files)
    return total


def truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


if __name__ == "__main__":
    main()
