"""Ideogram 4 in its own code, which fuses q, k, v.

Sources: diffusers, loaders/lora_conversion_utils.py; https://github.com/kohya-ss/musubi-tuner, src/musubi_tuner/ideogram4
"""

from .names import Rule, by

BLOCK = "layers.{i}.attention."

RULES: tuple[Rule, ...] = (
    (BLOCK + "qkv", BLOCK + "to_q", BLOCK + "to_k", BLOCK + "to_v"),
    (BLOCK + "o", BLOCK + "to_out.0"),
)

native = by(*RULES)
