"""Run the same merge by PEFT's ``add_weighted_adapter``.

    python benchmarks/peers/peft_merge.py OUT FILE FILE … --type svd --rank 8 --modules 10
    python benchmarks/peers/peft_merge.py OUT FILE FILE … --type ties_svd --density 0.2 --rank 8 --modules 10

PEFT merges inside a model.  This one has SDXL's module names and weight shapes, but each weight
is a single zero expanded to its shape: the five gigabytes that a user of PEFT loads are left
out of the figures, in its favour.
"""

import argparse
import json
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from sampling import Shape, modules
from torch import Tensor, nn

PREFIX = "base_model.model."
SPARSE = ("ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd")


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge with PEFT and print the times.")
    parser.add_argument("out")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--type", choices=["linear", "cat", "svd", *SPARSE], required=True)
    parser.add_argument("--density", type=float)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--modules", type=int)
    given = parser.parse_args()
    began, began_cpu = time.perf_counter(), time.process_time()
    chosen = modules(given.files[0], given.modules)
    model = with_adapters(container(chosen), given.files, list(chosen))
    names = [str(i) for i in range(len(given.files))]
    options = {"svd_rank": given.rank} if given.type.endswith("svd") else {}
    if given.type in SPARSE:
        options["density"] = given.density
    merging, merging_cpu = time.perf_counter(), time.process_time()
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", combination_type=given.type, **options)
    ms, cpu_ms = (1e3 * seconds / len(chosen) for seconds in _since(merging, merging_cpu))
    merged = get_peft_model_state_dict(model, adapter_name="merged")
    save_file({key.removeprefix(PREFIX): tensor.half().contiguous() for key, tensor in merged.items()}, given.out)
    run, run_cpu = _since(began, began_cpu)
    print("BENCH " + json.dumps({"run": run, "run_cpu": run_cpu, "ms": ms, "cpu_ms": cpu_ms, "modules": len(chosen)}))


def _since(wall: float, cpu: float) -> tuple[float, float]:
    return time.perf_counter() - wall, time.process_time() - cpu


def container(shapes: dict[str, Shape]) -> nn.Module:
    """Make a model with a linear layer at each name, whose weight takes no memory."""
    root = nn.Module()
    root.config = {"model_type": "custom"}
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        parent = root
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = getattr(parent, step)
        parent.add_module(leaf, _linear(shape))
    return root


def _linear(shape: Shape) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False)
    linear.out_features, linear.in_features = shape
    linear.weight = nn.Parameter(torch.zeros(1, 1).expand(shape), requires_grad=False)
    return linear


def with_adapters(root: nn.Module, files: list[str], names: list[str]) -> PeftModel:
    """Load the files as adapters "0", "1", …, as PEFT does."""
    model: PeftModel | None = None
    for i, path in enumerate(files):
        tensors = _tensors(path, names)
        rank = tensors[f"{PREFIX}{names[0]}.lora_A.weight"].shape[0]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=False)
        if model is None:
            model = get_peft_model(root, config, adapter_name=str(i))
        else:
            model.add_adapter(str(i), config)
        loaded = set_peft_model_state_dict(model, tensors, adapter_name=str(i))
        assert not loaded.unexpected_keys, loaded.unexpected_keys[:3]
    assert model is not None
    return model


def _tensors(path: str, names: list[str]) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {
            f"{PREFIX}{name}.lora_{part}.weight": file.get_tensor(f"{name}.lora_{part}.weight")
            for name in names
            for part in "AB"
        }


if __name__ == "__main__":
    main()
