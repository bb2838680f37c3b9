"""The LoRA that a learned merge results in."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..files.lora import LoRA
from ..files.metadata import RECIPE
from ..files.storage.texts import as_json, parsed
from ..layers import low_rank
from ..merging.plans import Plan
from ..merging.verbs import plan


def plan_sum(loras: Sequence[LoRA]) -> Plan:
    """Plan the plain sum of the LoRAs, which fails early if they can't be merged at all.

    Raises:
        MergeError: Families or shapes differ, or a layer has no low-rank form.
    """
    return plan(loras, weights=[1.0] * len(loras))


def assemble(
    planned: Plan,
    learned: Mapping[str, tuple[Tensor, Tensor]],
    method: str,
    options: Mapping[str, Any],
    identity: Mapping[str, Any],
) -> LoRA:
    """Return the plain sum with the learned factors in place of some modules' own.

    Args:
        planned: The plain sum.
        learned: ``up`` ``(out, r)`` and ``down`` ``(r, in·kh·kw)`` by module.
        method: Name of the way of learning in the file's recipe, a key of `provenance.LEARNED`.
        options: Its settings.
        identity: The base model and the data that it was learned on.
    """

    def layer(module: str) -> Any:
        if module not in learned:
            return planned.merger.outcome(module).layer
        up, down = (factor.float().cpu().contiguous().numpy() for factor in learned[module])
        return low_rank(up, down, planned.steps[module].shape)

    summed = planned.lora()
    recipe = parsed(summed.metadata[RECIPE], RECIPE) | {
        "method": method,
        "options": dict(options),
        "learned_on": dict(identity),
    }
    for entry in recipe["inputs"]:
        entry["weight"] = "learned"
    return replace(
        summed,
        layouts={module: layer(module) for module in planned.steps},
        compute=None,
        metadata={**summed.metadata, RECIPE: as_json(recipe)},
    )
