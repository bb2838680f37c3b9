"""Run mergekit's own TIES and DARE on dense ΔWs.  The result stays dense: mergekit doesn't cut it to a rank.

python benchmarks/peers/mergekit_sparse.py OUT FILE FILE … --type ties --density 0.2 --modules 10
"""

import argparse
import json
import time

import torch
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.generalized_task_arithmetic import ConsensusMethod, GeneralizedTaskArithmeticMerge
from mergekit.sparsify import SparsificationMethod
from safetensors import safe_open
from safetensors.torch import save_file
from sampling import modules
from torch import Tensor

TYPES = {
    "ties": (ConsensusMethod.sum, SparsificationMethod.magnitude, True, False),
    "dare_linear": (None, SparsificationMethod.random, False, True),
    "dare_ties": (ConsensusMethod.sum, SparsificationMethod.random, False, True),
}
"""As in mergekit's index: consensus, sparsification, normalize, rescale."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge dense ΔWs with mergekit and print the times.")
    parser.add_argument("out")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--type", choices=TYPES, required=True)
    parser.add_argument("--density", type=float, required=True)
    parser.add_argument("--modules", type=int)
    given = parser.parse_args()
    chosen = modules(given.files[0], given.modules)
    began, began_cpu = time.perf_counter(), time.process_time()
    for module in chosen:
        merged = merge([delta(path, module) for path in given.files], given.type, given.density)
    report = {
        "ms": 1e3 * (time.perf_counter() - began) / len(chosen),
        "cpu_ms": 1e3 * (time.process_time() - began_cpu) / len(chosen),
    }
    save_file({module: merged}, given.out)
    print("BENCH " + json.dumps(report))


def merge(deltas: list[Tensor], name: str, density: float) -> Tensor:
    """Merge ΔWs as tuned models over a base of zeros."""
    consensus, sparsification, normalize, rescale = TYPES[name]
    method = GeneralizedTaskArithmeticMerge(consensus, sparsification, normalize, rescale, name, None, None)
    count = len(deltas)
    return method.merge_group(
        TensorGroup.from_tensors([torch.zeros_like(deltas[0]), *deltas], base_index=0),
        weight=dict.fromkeys(range(1, count + 1), 1 / count),
        density=dict.fromkeys(range(1, count + 1), density),
        **{"normalize": normalize, "rescale": rescale, "int8_mask": False, "lambda": 1.0},
    )


def delta(path: str, module: str) -> Tensor:
    with safe_open(path, "pt") as file:
        up, down = (file.get_tensor(f"{module}.lora_{part}.weight").float() for part in "BA")
    return up @ down


if __name__ == "__main__":
    main()
