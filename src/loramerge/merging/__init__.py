"""Merging LoRAs: plan, merge and resize; recipes and sweeps; baking into a checkpoint."""

from typing import TYPE_CHECKING

from ..registry import face

if TYPE_CHECKING:
    from .averaging import average as average
    from .baking import Baked as Baked, bake as bake
    from .coefficients import Coefficients as Coefficients
    from .ledger import Row as Row
    from .plans import Plan as Plan
    from .publishing import model_card as model_card, push as push
    from .recipe import Recipe as Recipe
    from .recipe_text import Input as Input, Output as Output
    from .rules import RULES as RULES, Rule as Rule, Scope as Scope
    from .running import Kept as Kept, Outcome as Outcome
    from .schemas import RECIPE_SCHEMA as RECIPE_SCHEMA, recipe_schema as recipe_schema
    from .steps import Step as Step
    from .sweeping import sweep as sweep
    from .toml import Table as Table, parse_toml as parse_toml
    from .verbs import merge as merge, plan as plan, resize as resize
    from .weights import Weight as Weight, Weights as Weights, resolve as resolve
else:
    __getattr__, __dir__, __all__ = face(
        __name__,
        {
            "averaging": ("average",),
            "baking": ("Baked", "bake"),
            "coefficients": ("Coefficients",),
            "ledger": ("Row",),
            "plans": ("Plan",),
            "publishing": ("model_card", "push"),
            "recipe": ("Recipe",),
            "recipe_text": ("Input", "Output"),
            "rules": ("RULES", "Rule", "Scope"),
            "running": ("Kept", "Outcome"),
            "schemas": ("RECIPE_SCHEMA", "recipe_schema"),
            "steps": ("Step",),
            "sweeping": ("sweep",),
            "toml": ("Table", "parse_toml"),
            "verbs": ("merge", "plan", "resize"),
            "weights": ("Weight", "Weights", "resolve"),
        },
    )
