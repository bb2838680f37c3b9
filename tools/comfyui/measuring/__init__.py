"""Nodes that measure the pack inside of ComfyUI: models, LoRA files for them, and what two patched models differ by."""

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import comfy.lora
import comfy.sd
import folder_paths
import torch

import loramerge as lm
from loramerge import LoRA
from loramerge.files.architectures import ARCHITECTURES, Architecture, lumina, model
from loramerge.testing import everything, random_layer

from .models import models, real

KINDS = ("lora", "loha", "lokr", "dora")
FAMILY = {"required": {"family": ("STRING", {})}}


Shape = tuple[int, ...]


def present(a: Architecture, weights: dict[str, Shape]) -> dict[str, tuple[Shape, bool]]:
    """Return the modules of a family that a model has: the shape of each there, and whether it is a weight of its own.

    Args:
        a: The family.
        weights: The shapes of the model's weights. Where one holds several modules, they share its rows as in the real model.
    """
    paths = (
        lumina.z_image(model(a.model)) if a.name == "z-image" else a.native_paths
    )  # trainers have names of their own
    homes = {f"diffusion_model.{path}.weight": parts for path, parts in paths.items()}
    for encoder in a.text_encoders:
        homes |= {f"{encoder.comfyui}.transformer.{p}.weight": parts for p, parts in a.text_paths(encoder).items()}
    found = {}
    for key, parts in homes.items():
        if key in weights:
            rows = [a.shapes[part.module][0] for part in parts]
            for part, own in zip(parts, rows, strict=True):
                shape = (weights[key][0] * own // sum(rows), *weights[key][1:])
                found[part.module] = (shape, len(parts) == 1)
    return found


def trained(module: str, shape: Shape) -> bool:
    """Return whether trainers make LoRAs for a module: not for T5's table of distances."""
    return everything(module, shape) and not module.endswith("relative_attention_bias")


class Model:
    """A model and its text encoders."""

    INPUT_TYPES = classmethod(lambda cls: FAMILY)
    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "run"
    CATEGORY = "measuring"

    def run(self, family: str) -> tuple[Any, Any]:
        """Return them."""
        return models(family)


class Files:
    """LoRAs on every layer of a model: two of rank 4 and 8, and one of each other kind, in two dialects."""

    INPUT_TYPES = classmethod(lambda cls: FAMILY)
    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = "measuring"

    def run(self, family: str) -> dict[str, Any]:
        """Write them, and say what ComfyUI is known to leave out of each."""
        model, clip = models(family)
        weights = {**model.model.state_dict(), **(clip.cond_stage_model.state_dict() if clip else {})}
        found = present(ARCHITECTURES[family], {key: tuple(weight.shape) for key, weight in weights.items()})
        notes: dict[str, list[str]] = {}
        for name, kind, rank in (*((k, k, 4) for k in KINDS), ("second", "lora", 8)):
            # What is one weight in ComfyUI can't keep the LoHas, LoKrs or DoRAs of its parts.
            shapes = {m: s for m, (s, alone) in found.items() if trained(m, s) and (alone or kind == "lora")}
            layers = {
                m: random_layer(s, kind=kind, rank=rank, alpha=2.0, seed=crc32(f"{name}/{m}".encode()))
                for m, s in shapes.items()
            }
            lora = LoRA(name=name, architecture=family, dialect="kohya", layouts=layers)
            for dialect in ("kohya", "comfyui"):
                file = f"{family}-{name}-{dialect}.safetensors"
                said: list[str] = []
                path = Path(folder_paths.get_folder_paths("loras")[0]) / file
                lm.save(lora, path, dialect=dialect, noted=said.append)
                notes[file] = [line for line in said if line.startswith("ComfyUI")]
        return {"ui": {"text": [json.dumps({"layers": len(found), "notes": notes})]}}


class Difference:
    """The differences of two patched models, weight by weight."""

    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {"model": ("MODEL",), "other": ("MODEL",)},
            "optional": {"clip": ("CLIP",), "other_clip": ("CLIP",)},
        }
    )
    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = "measuring"

    def run(self, model: Any, other: Any, clip: Any = None, other_clip: Any = None) -> dict[str, Any]:
        """Return the worst relative difference of a patched weight, and how many weights both change."""
        pairs = [(model, other)] + ([(clip.patcher, other_clip.patcher)] if clip else [])
        worst, where, count = 0.0, "", 0
        missed: list[str] = []
        for one, two in pairs:
            weights = one.model.state_dict()
            for key in {**one.patches, **two.patches}:
                if key not in one.patches or key not in two.patches:
                    missed.append(key)
                    continue
                weight = weights[key].float()
                a, b = (comfy.lora.calculate_weight(p.patches[key], weight.clone(), key) for p in (one, two))
                size = float(torch.linalg.vector_norm(b))
                relative = float(torch.linalg.vector_norm(a.sub_(b))) / size
                if not relative <= worst:
                    worst, where = relative, key
                count += 1
        found = {"worst": worst, "where": where, "weights": count, "missed": missed}
        return {"ui": {"text": [json.dumps(found)]}, "result": ()}


class Checkpoint:
    """A checkpoint of Stable Diffusion 1.5 with random weights."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": ("STRING", {})}})
    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = "measuring"

    def run(self, name: str) -> dict[str, Any]:
        """Write it into ComfyUI's folder."""
        model, clip, vae = real()
        path = Path(folder_paths.get_folder_paths("checkpoints")[0]) / name
        comfy.sd.save_checkpoint(str(path), model, clip=clip, vae=vae)
        return {"ui": {"text": [name]}}


NODE_CLASS_MAPPINGS = {"MeasureCheckpoint": Checkpoint, "MeasureModel": Model, "MeasureFiles": Files, "MeasureDifference": Difference}  # fmt: skip
