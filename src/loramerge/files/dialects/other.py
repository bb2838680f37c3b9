"""Whatever else ends like a LoRA: modules keep the names that the file gives them."""

from .base import LYCORIS_KINDS, Dialect
from .suffixes import STYLES

OTHER = Dialect(
    name="other",
    title="an unknown tool's names, kept as they are",
    source="https://github.com/kohya-ss/sd-scripts, networks/lora.py (suffixes)",
    names=lambda a: {},
    style="kohya",
    also_reads=frozenset(STYLES) | {"peft-named"},
    begins=("",),
    alpha="keep",
    rewrites=True,
    holds=LYCORIS_KINDS,
)
