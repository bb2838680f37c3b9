"""Merging LoRAs: plan, merge and resize; recipes and sweeps; baking into a checkpoint."""

from typing import TYPE_CHECKING

from ..registry import face

if TYPE_CHECKING:
    from .baking import Baked as Baked, bake as bake
    from .coefficients import Coefficients as Coefficients
    from .ledger import Row as Row
    from .plans import Plan as Plan
    from .recipe import Recipe as Recipe
    from .recipe_text import Input as Input, Output as Output
    from .rules import RULES as RULES, Rule as Rule, Scope as Scope
    from .running import Kept as Kept, Outcome as Outcome
    from .steps import Step as Step
    from .sweeping import sweep as sweep
    from .toml import Table as Table, parse_toml as parse_toml
    from .verbs import merge as merge, plan as plan, resize as resize
    from .weights import Weight as Weight, Weights as Weights
else:
    __getattr__, __dir__, __all__ = face(
        __name__,
        {
            "baking": ("Baked", "bake"),
            "coefficients": ("Coefficients",),
            "ledger": ("Row",),
            "plans": ("Plan",),
            "recipe": ("Recipe",),
            "recipe_text": ("Input", "Output"),
            "rules": ("RULES", "Rule", "Scope"),
            "running": ("Kept", "Outcome"),
            "steps": ("Step",),
            "sweeping": ("sweep",),
            "toml": ("Table", "parse_toml"),
            "verbs": ("merge", "plan", "resize"),
            "weights": ("Weight", "Weights"),
        },
    )
