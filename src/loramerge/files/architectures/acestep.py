"""ACE-Step 1.5 in its own code, whose attention has transformers' names.

Source: https://github.com/ace-step/ACE-Step-1.5; diffusers, _convert_non_diffusers_ace_step_lora_to_diffusers
"""

from .names import Rule, by, inside

LAYERS = (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("o_proj", "to_out.0"))
BLOCKS = tuple((f"layers.{{i}}.{name}.", f"layers.{{i}}.{name}.") for name in ("self_attn", "cross_attn"))

RULES: tuple[Rule, ...] = inside(BLOCKS, LAYERS)

native = by(*RULES)
