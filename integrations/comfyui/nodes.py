"""The nodes: what each does is in `loramerge`; here is how ComfyUI gives and takes it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.utils
import numpy as np
import torch

import loramerge as lm
from loramerge.cli.compare import as_text
from loramerge.cli.inspection import as_data, summary
from loramerge.cli.merge import options_of
from loramerge.comparing.plots import as_it_is, heatmap
from loramerge.errors import OptionError
from loramerge.files import ARCHITECTURES, DIALECTS
from loramerge.files.metadata import RECIPE
from loramerge.merging import RULES
from loramerge.merging.methods import METHODS

from . import files
from .node import LORAS, Input, Node, Output
from .patching import patched
from .stacks import Stack, Weighted, alone, only, weight_of

AS_GIVEN = "as given"
AS_IT_IS = "as it is"
FITS: dict[str, Callable[[str], dict[str, Any]]] = {
    "exact": lambda limit: {},
    "largest rank": lambda limit: {"rank": "max"},
    "rank": lambda limit: {"rank": limit},
    "error": lambda limit: {"max_error": limit},
    "energy": lambda limit: {"energy": limit},
    "size": lambda limit: {"max_size": limit},
}
"""The arguments of a merge for each way to choose the rank, from the text beside it."""


def _progress() -> Callable[[int, int], None]:
    """Return a function that moves ComfyUI's bar; it raises if the user has stopped the workflow."""
    bar = comfy.utils.ProgressBar(1)
    return lambda done, total: bar.update_absolute(done, total)


def lora_file(file: str, weight: float, blocks: str, family: str = "", loras: Stack = ()) -> tuple[Stack]:
    """Read a LoRA of any tool from ComfyUI's folder of LoRAs, and put it on a stack with its weight."""
    lora = lm.load(files.lora(file), architecture=family or None, allow_pickle=True)  # tensors only
    return ((*loras, Weighted(lora, weight_of(weight, blocks))),)


def inspect(loras: Stack) -> tuple[str, str, str]:
    """Say what each LoRA is: family, dialect, kinds of layers, ranks, alphas; its trigger words; and its recipe if it was merged."""
    words = [word for each in loras for word in as_data(each.lora, {})["trigger_words"]]
    recipes = [lm.Recipe.of(each.lora).to_toml() for each in loras if RECIPE in each.lora.metadata]
    return "\n\n".join(summary(each.lora) for each in loras), ", ".join(dict.fromkeys(words)), "\n".join(recipes)


def compare(loras: Stack) -> tuple[str, torch.Tensor]:
    """Measure what LoRAs share and where they conflict, block by block, before they are merged."""
    found = lm.compare([each.lora for each in loras], progress=_progress())
    with as_it_is():
        figure = heatmap(found)
        figure.set_dpi(120)
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined]
    return as_text(found, [], None), torch.from_numpy(pixels.astype(np.float32) / 255)[None]


def merge(loras: Stack, strength: str, method: str, options: str, fit: str, limit: str, base: str = "") -> tuple[Stack]:
    """Merge a stack into one LoRA: the exact weighted sum of all updates, or its best fit at a smaller rank."""
    merged = lm.merge(
        [each.lora for each in loras],
        weights=[each.weight for each in loras] if strength == AS_GIVEN else strength,
        method=method,
        base=files.base(base),
        progress=_progress(),
        **FITS[fit](limit),
        **options_of(method, options.split()),
    )
    return (alone(merged),)


def resize(loras: Stack, fit: str, limit: str) -> tuple[Stack]:
    """Make the best fit to each LoRA of a stack at smaller ranks."""
    how = FITS[fit](limit)
    return (tuple(each._replace(lora=lm.resize(each.lora, **how, progress=_progress())) for each in loras),)


def apply(
    model: Any, loras: Stack, strength_model: float, strength_clip: float, clip: Any = None
) -> tuple[Any, Any, str]:
    """Patch a model and its text encoders with each LoRA of a stack at its weight, as ComfyUI's loader does with a file."""
    return patched(model, clip, loras, strength_model, strength_clip)


def save(loras: Stack, name: str, dialect: str, dtype: str, overwrite: bool) -> tuple[str]:
    """Save a LoRA into ComfyUI's folder of LoRAs, whole or not at all; how it was merged is kept in the file."""
    lora = only(loras, "Save")
    if dialect == AS_IT_IS and lora.dialect == "peft":
        raise OptionError(
            f"{lora.name} has PEFT's layout, which is saved as a folder, and ComfyUI lists files. Way out: the dialect comfyui."
        )
    path = files.target(name, overwrite)
    lm.save(
        lora,
        path,
        dialect=None if dialect == AS_IT_IS else dialect,
        dtype=None if dtype == AS_IT_IS else dtype,
        progress=_progress(),
    )
    return (files.name_of(path),)


def run_recipe(recipe: str) -> tuple[Stack]:
    """Run a merge that is written down, as 'Inspect' gives it for a merged file; LoRAs and base are named as ComfyUI lists them."""
    found = _here(recipe)
    loras = found.open()
    try:
        return (alone(found.plan(loras, progress=_progress()).lora().in_memory(_progress())),)
    finally:
        for lora in loras:
            lora.close()


def _here(text: str) -> lm.Recipe:
    """Return a recipe whose files are in ComfyUI's folders.

    Raises:
        OptionError: The recipe names code, a repository or a file elsewhere: a workflow may come from anyone.
    """
    recipe = lm.Recipe.parse(text, "the recipe")
    if recipe.method not in METHODS:
        raise OptionError(
            f"A workflow runs loramerge's own methods only, got {recipe.method!r}. Way out: the command line."
        )
    if any(entry.hub for entry in recipe.loras):
        raise OptionError("A workflow reads ComfyUI's own LoRAs only, got a name on the Hub. Way out: download it.")
    weights = recipe.weights
    return replace(
        recipe,
        loras=tuple(replace(entry, path=str(files.lora(entry.path or ""))) for entry in recipe.loras),
        weights=str(files.lora(weights)) if isinstance(weights, str) and weights.endswith(".safetensors") else weights,
        base=None if recipe.base is None else str(files.base(recipe.base)),
    )


def state_of_recipe(recipe: str) -> str:
    """Return the state of the files that a recipe names."""
    found = _here(recipe)
    return files.state(*(Path(entry.path or "") for entry in found.loras))


STACK = Input("loras", LORAS, "A stack of LoRAs, each with its weight.")
STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
LIMIT = Input(
    "limit",
    "STRING",
    "For rank: a number, 16. For error and energy: a share, 1% or 99.9%. For size: 150MB.",
    options={"default": "16"},
)


def _fit(*names: str) -> Input:
    tip = "How small: the rank of all, or a budget from which each module gets its rank."
    return Input("fit", "COMBO", tip, choices=lambda: names, options={"default": names[0]})


NODES = (
    Node(
        id="LoramergeFile",
        title="LoRA file",
        run=lora_file,
        inputs=(
            Input(
                "file",
                "COMBO",
                "A file in ComfyUI's folders of LoRAs, in the dialect of any tool.",
                choices=files.loras,
            ),
            Input("weight", "FLOAT", "The strength. It may be negative.", options=STRENGTH),
            Input(
                "blocks",
                "STRING",
                "Weights of some modules instead: text_encoder=0;OUT*=0.5, or lbw:1,0,0,…, or blora:style.",
                options={"default": ""},
            ),
            Input(
                "family",
                "COMBO",
                "The model family, if the file leaves it open.",
                optional=True,
                choices=lambda: ["", *ARCHITECTURES],
                options={"default": ""},
            ),
            Input("loras", LORAS, "The stack that this LoRA is put on.", optional=True),
        ),
        outputs=(Output("loras", LORAS),),
        state=lambda file, **given: files.state(files.lora(file)),
    ),
    Node(
        id="LoramergeInspect",
        title="Inspect LoRAs",
        run=inspect,
        inputs=(STACK,),
        outputs=(Output("text", "STRING"), Output("trigger words", "STRING"), Output("recipe", "STRING")),
    ),
    Node(
        id="LoramergeCompare",
        title="Compare LoRAs",
        run=compare,
        inputs=(STACK,),
        outputs=(Output("table", "STRING"), Output("heat map", "IMAGE")),
    ),
    Node(
        id="LoramergeMerge",
        title="Merge LoRAs",
        run=merge,
        inputs=(
            STACK,
            Input(
                "strength",
                "COMBO",
                "The weights: those of the stack, or by a rule. "
                + " ".join(f"{rule.name}: {rule.text}." for rule in RULES.values()),
                choices=lambda: [AS_GIVEN, *RULES],
                options={"default": AS_GIVEN},
            ),
            Input(
                "method",
                "COMBO",
                "linear is the weighted sum.",
                choices=lambda: list(METHODS),
                options={"default": "linear"},
            ),
            Input(
                "options",
                "STRING",
                "The method's own, such as density=0.3; those that aren't named have their defaults.",
                options={"default": ""},
            ),
            _fit(*FITS),
            LIMIT,
            Input(
                "base",
                "COMBO",
                "The base model, for DoRA layers only.",
                optional=True,
                choices=files.bases,
                options={"default": ""},
            ),
        ),
        outputs=(Output("loras", LORAS),),
    ),
    Node(
        id="LoramergeResize",
        title="Resize LoRAs",
        run=resize,
        inputs=(STACK, _fit("rank", "error", "energy", "size"), LIMIT),
        outputs=(Output("loras", LORAS),),
    ),
    Node(
        id="LoramergeApply",
        title="Apply LoRAs",
        run=apply,
        inputs=(
            Input("model", "MODEL", "The model to patch."),
            STACK,
            Input("strength_model", "FLOAT", "Times every weight of the stack, in the model.", options=STRENGTH),
            Input("strength_clip", "FLOAT", "The same in the text encoders.", options=STRENGTH),
            Input("clip", "CLIP", "The text encoders to patch.", optional=True),
        ),
        outputs=(Output("model", "MODEL"), Output("clip", "CLIP"), Output("report", "STRING")),
    ),
    Node(
        id="LoramergeSave",
        title="Save LoRA",
        run=save,
        inputs=(
            STACK,
            Input(
                "name",
                "STRING",
                "A name in ComfyUI's folder of LoRAs: merged, or people/both.",
                options={"default": "merged"},
            ),
            Input(
                "dialect",
                "COMBO",
                "Whose names the tensors get; ComfyUI reads comfyui whole.",
                choices=lambda: [*(d.name for d in DIALECTS.values() if d.writes and d.name != "peft"), AS_IT_IS],
                options={"default": "comfyui"},
            ),
            Input(
                "dtype",
                "COMBO",
                "The precision of the file; a merge has the widest of its inputs.",
                choices=lambda: [AS_IT_IS, "float16", "bfloat16", "float32"],
                options={"default": AS_IT_IS},
            ),
            Input("overwrite", "BOOLEAN", "Replace a file with this name.", options={"default": False}),
        ),
        outputs=(Output("file", "STRING"),),
        is_end=True,
    ),
    Node(
        id="LoramergeRecipe",
        title="Run recipe",
        run=run_recipe,
        inputs=(Input("recipe", "STRING", "A recipe in TOML.", options={"multiline": True, "default": ""}),),
        outputs=(Output("loras", LORAS),),
        state=state_of_recipe,
    ),
)
"""Every node, in the order of the menu."""
