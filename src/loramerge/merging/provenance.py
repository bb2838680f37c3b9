"""How a merge was made, as the merged file says it: enough to make it again, and to see that nothing has changed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..registry import code_of
from ..tensors import NAMES
from .methods import METHODS

if TYPE_CHECKING:
    from .methods import Method
    from .plans import Plan

UNKNOWN = "0" * 64
"""Stands for a hash that is not known yet."""

LEARNED = {"ziplora": "zip", "lsq": "calibrate"}
"""Methods that merge by what a model does, and the command of each."""


def record(plan: "Plan", hashes: Sequence[str], base: str | None = None) -> dict[str, Any]:
    """A plan's recipe.

    Args:
        plan: The plan.
        hashes: SHA-256 of every input's tensors, see `LoRA.sha256`.
        base: That of the base model, see `Checkpoint.sha256`, where ΔW depends on it.
    """
    from .._version import __version__

    weights = plan.weights.given
    found: dict[str, Any] = {"loramerge": __version__, **_method(plan.method), "options": dict(plan.options)}
    found |= {"weights": weights} if isinstance(weights, str) else {}
    found |= {"scope": plan.scope} if weights == "l2" else {}
    found |= {"rank": plan.rank}
    if plan.budget:
        value = plan.budget.value
        found["budget"] = {plan.budget.kind: int(value) if plan.budget.kind == "max_size" else value}
        found["ranks"] = {m: plan.rank_of(m) for m, step in plan.steps.items() if not step.rankless}
    found |= {"exclude": list(plan.exclude)} if plan.exclude else {}
    found |= {"device": plan.device} if plan.device else {}
    found |= {"base": plan.base.name} if plan.base else {}
    found |= {"base_sha256": base} if base else {}
    found["inputs"] = [_input(lora, sha256) for lora, sha256 in zip(plan.given, hashes, strict=True)]
    if not isinstance(weights, str):
        for entry, weight in zip(found["inputs"], weights, strict=True):
            entry["weight"] = dict(weight) if isinstance(weight, Mapping) else weight
    return found | {"output": {"dialect": plan.dialect, "dtype": NAMES[plan.dtype]}}


def _method(method: "Method") -> dict[str, Any]:
    """How a method is found again; of one that isn't loramerge's own also the SHA-256 of its code, where it has a file."""
    if method.name in METHODS:
        return {"method": method.name}
    return {"method": method.reference or method.name, "method_sha256": code_of(method.function)}


def _input(lora: Any, sha256: str) -> dict[str, Any]:
    """One LoRA, by where it was read, without the directories of this machine."""
    entry = {"name": lora.name, "sha256": sha256}
    if lora.as_read and lora.origin.source is not None:
        entry |= {"source": lora.origin.source, **lora.origin.forced}
    return entry
