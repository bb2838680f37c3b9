"""The example workflows, in the API's format, and where each node stands on the canvas."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import loramerge as lm
from loramerge.testing import random_lora

sys.path.append(str(Path(__file__).parents[1]))
from draw_heatmap import chosen, related

Workflow = dict[str, dict[str, Any]]

RECIPE = """\
method = "ties"
rank = 8

[options]
density = 0.5

[[loras]]
path = "person.safetensors"
weight = 0.7

[[loras]]
path = "jersey.safetensors"
weight = 0.5
"""


def _file(name: str, weight: float, below: str | None = None) -> dict[str, Any]:
    stack = {"loras": [below, 0]} if below else {}
    return _node("LoramergeFile", file=f"{name}.safetensors", weight=weight, blocks="", family="", **stack)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _merge(loras: str, **more: Any) -> dict[str, Any]:
    inputs = {"strength": "as given", "method": "linear", "options": "", "fit": "exact", "limit": "16", "base": ""}
    return _node("LoramergeMerge", loras=[loras, 0], **{**inputs, **more})


def _save(loras: str, name: str) -> dict[str, Any]:
    return _node("LoramergeSave", loras=[loras, 0], name=name, dialect="comfyui", dtype="as it is", overwrite=True)


def _preview(source: list[Any]) -> dict[str, Any]:
    return _node("PreviewAny", source=source, preview="")  # the page has a widget of this name


def look() -> Workflow:
    """See what two LoRAs are, and what they share."""
    return {
        "1": _file("person", 1.0),
        "2": _file("jersey", 1.0, "1"),
        "3": _node("LoramergeInspect", loras=["2", 0]),
        "4": _preview(["3", 0]),
        "5": _preview(["3", 1]),
        "6": _node("LoramergeCompare", loras=["2", 0]),
        "7": _preview(["6", 0]),
        "8": _node("PreviewImage", images=["6", 1]),
    }


def draw() -> Workflow:
    """Merge two LoRAs, draw with the result without a file, and save it."""
    return {
        "1": _file("person", 0.7),
        "2": _file("jersey", 0.5, "1"),
        "3": _merge("2"),
        "4": _save("3", "both"),
        "5": _node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "6": _node(
            "LoramergeApply", model=["5", 0], clip=["5", 1], loras=["3", 0], strength_model=1.0, strength_clip=1.0
        ),
        "7": _node("CLIPTextEncode", clip=["6", 1], text="a photo of a person in a striped jersey"),
        "8": _node("CLIPTextEncode", clip=["6", 1], text="blurry"),
        "9": _node("EmptyLatentImage", width=512, height=512, batch_size=1),
        "10": _node(
            "KSampler",
            model=["6", 0],
            positive=["7", 0],
            negative=["8", 0],
            latent_image=["9", 0],
            seed=0,
            steps=20,
            cfg=7.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "11": _node("VAEDecode", samples=["10", 0], vae=["5", 2]),
        "12": _node("SaveImage", images=["11", 0], filename_prefix="loramerge"),
    }


def recipe() -> Workflow:
    """Run a recipe, make the result smaller, save it, and read the recipe that is kept in it."""
    return {
        "1": _node("LoramergeRecipe", recipe=RECIPE),
        "2": _node("LoramergeInspect", loras=["1", 0]),
        "3": _preview(["2", 2]),
        "4": _node("LoramergeResize", loras=["1", 0], fit="error", limit="20%"),
        "5": _save("4", "ties"),
    }


EXAMPLES: dict[str, tuple[Callable[[], Workflow], dict[str, tuple[float, ...]]]] = {
    "look": (
        look,
        {
            "1": (0, 0), "2": (0, 1), "3": (1, 0), "6": (1, 1.6), "4": (2, 0), "5": (3, 0), "7": (2, 1, 2.4), "8": (2, 2, 2.4),
        },
    ),
    "draw": (
        draw,
        {
            "1": (0, 0), "2": (0, 1), "5": (0, 2), "3": (1, 0), "4": (2, 0), "6": (1, 1.5), "7": (2, 1.1), "8": (2, 2.1),
            "9": (3, 0.1), "10": (3, 1.1), "11": (4, 0), "12": (4, 0.6),
        },
    ),
    "recipe": (recipe, {"1": (0, 0), "2": (1, 0), "3": (2, 0), "4": (1, 1.2), "5": (2, 1.6)}),
}  # fmt: skip
"""Each workflow, with the column and the row of each node, and its width in columns if that isn't one."""

RUN = ("look", "recipe")
"""Workflows that need no base model."""


def samples(folder: Path, family: str) -> None:
    """Write the two LoRAs of the workflows into a server's folder; in some blocks they use the same spaces."""
    words = {"person": "a photo of sks", "jersey": "striped jersey"}
    person, jersey = (
        replace(
            random_lora(family, rank=16, seed=seed, only=chosen, name=f"{name}.safetensors"),
            metadata={"modelspec.trigger_phrase": words[name]},
        )
        for seed, name in ((1, "person"), (2, "jersey"))
    )
    unet = {m: related(m, person[m], layer) if m in person else layer for m, layer in jersey.items()}
    for name, lora, dialect in (
        ("person", person, "kohya"),
        ("jersey", replace(jersey, layouts=unet), "diffusers-peft"),
    ):
        lm.save(lora, folder / "models/loras" / f"{name}.safetensors", dialect=dialect)
