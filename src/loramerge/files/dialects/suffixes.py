"""The ends of keys, which say what tensor of a layer a key names.

A key is a module's name in some dialect (its *stem*) and a suffix.  The suffix says the role
of the tensor and, for LoRA's own tensors, the *style* of the tool that wrote it.
"""

import re
from typing import NamedTuple

from ...layers import UNKNOWN

STYLES: dict[str, dict[str, str]] = {
    "kohya": {
        "down": ".lora_down.weight",
        "up": ".lora_up.weight",
        "mid": ".lora_mid.weight",
        "up_bias": ".lora_up.bias",
    },
    "peft": {
        "down": ".lora_A.weight",
        "up": ".lora_B.weight",
        "up_bias": ".lora_B.bias",
        "row_magnitude": ".lora_magnitude_vector.weight",
    },
    "peft-short": {"down": ".lora_A", "up": ".lora_B", "row_magnitude": ".lora_magnitude_vector"},
    "diffusers": {"down": ".lora.down.weight", "up": ".lora.up.weight"},
    "diffusers-text": {"down": ".lora_linear_layer.down.weight", "up": ".lora_linear_layer.up.weight"},
    "diffusers-old": {"down": "_lora.down.weight", "up": "_lora.up.weight"},
    "underscored": {"down": "_lora_down.weight", "up": "_lora_up.weight"},
    "bare": {"down": ".down.weight", "up": ".up.weight"},
    "numbered": {"down": ":down", "up": ":up"},
    "merged": {"diff": ".lora.weight"},
}
"""Suffixes of LoRA's own tensors, by family of tools and role."""

SHARED: dict[str, str] = {
    ".alpha": "alpha",
    ".scale": "scale",
    ".dora_scale": "magnitude",
    ".magnitude": "magnitude",
    ".hada_w1_a": "hada_w1_a",
    ".hada_w1_b": "hada_w1_b",
    ".hada_w2_a": "hada_w2_a",
    ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1",
    ".hada_t2": "hada_t2",
    ".lokr_w1": "lokr_w1",
    ".lokr_w1_a": "lokr_w1_a",
    ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2": "lokr_w2",
    ".lokr_w2_a": "lokr_w2_a",
    ".lokr_w2_b": "lokr_w2_b",
    ".lokr_t2": "lokr_t2",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".diff_m": "diff_m",
    ".set_weight": "set_weight",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
    ".reshape_weight": "reshape_weight",
    ".oft_blocks": "oft_blocks",
    ".oft_diag": "oft_diag",
    ".oft_R.weight": "oft_R",
    ".oft_R.scaled_oft": "oft_R_scaled",
    ".rescale": "rescale",
    ".a1.weight": "a1",
    ".a2.weight": "a2",
    ".b1.weight": "b1",
    ".b2.weight": "b2",
    ".bm.weight": "bm",
    ".on_input": "on_input",
    ".lora_E": "diagonal",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
}
"""Roles of all other tensors, by the suffix that every tool gives them."""

SPELLINGS: dict[str, str] = {role: suffix for suffix, role in SHARED.items() if suffix != ".magnitude"}

_EXACT: dict[str, tuple[str, str]] = {
    **{suffix: (role, "") for suffix, role in SHARED.items()},
    **{suffix: (role, style) for style, roles in STYLES.items() for role, suffix in roles.items()},
}
_GLUED = tuple(suffix for suffix in _EXACT if suffix[0] not in ".:")
_XLABS = re.compile(r"\.processor\.(?:qkv|proj)_lora\.(?:down|up)\.weight")
"""Matches the ends of XLabs' keys of single blocks, whose stems end in ``_lora``."""
_NAMED = (
    r"(.+)\.(lora_(?:A|B|E|magnitude_vector|embedding_A|embedding_B)|hada_\w+|lokr_\w+)\.([^.]+?)(\.weight|\.bias|)"
)
_NAMELESS = (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".alpha")
"""Ends of most keys, which name no adapter."""

_NAMED_ROLES = {("lora_A", ""): "down", ("lora_B", ""): "up", ("lora_B", ".bias"): "up_bias"}
_NAMED_ROLES |= {("lora_magnitude_vector", ""): "row_magnitude"}
_NAMED_ROLES |= {
    (suffix[1:], ""): role for suffix, role in SHARED.items() if suffix.startswith((".hada_", ".lokr_", ".lora_"))
}


class Key(NamedTuple):
    """A key, taken apart."""

    stem: str
    role: str
    style: str
    """The style of LoRA's own tensors; empty for the others."""


def parse(key: str) -> Key | None:
    """Take a key apart; None if it has no known suffix."""
    # "to_q_lora.down.weight" ends in ".down.weight" too: the glued suffixes come first.
    if key.endswith(_GLUED) and not _XLABS.search(key):
        suffix = next(suffix for suffix in _GLUED if key.endswith(suffix))
        return Key(key[: -len(suffix)], *_EXACT[suffix])
    for start in _starts(key):
        if found := _EXACT.get(key[start:]):
            return Key(_owner(key[:start], found[0]), *found)
    if block := re.fullmatch(r"(.+)\.(oft_blocks\.\d+)", key):
        return Key(block[1], UNKNOWN + block[2], "")
    if (named := re.fullmatch(_NAMED, key)) and (
        role := _NAMED_ROLES.get((named[2], named[4].removesuffix(".weight")))
    ):
        return Key(named[1], role, "" if role in SHARED.values() else "peft-named")
    return None


MODULATION = re.compile(r"[._]modulation$")
"""Matches the end of the name of the parameter that ``diff_m`` changes; the key names only its block."""


def _owner(stem: str, role: str) -> str:
    """Return the stem of the parameter that a tensor changes."""
    return f"{stem}{'.' if '.' in stem else '_'}modulation" if role == "diff_m" else stem


def spelled(stem: str, suffix: str) -> str:
    """Put a stem and a suffix together: the inverse of `parse`."""
    if suffix != ".diff_m":
        return stem + suffix
    return MODULATION.sub(suffix, stem) if MODULATION.search(stem) else f"{stem}.diff"


def adapter(key: str) -> str | None:
    """Return the adapter that a PEFT key names, such as ``person`` in ``….lora_A.person.weight``."""
    if key.endswith(_NAMELESS):
        return None
    named = re.fullmatch(_NAMED, key)
    return named[3] if named and named[3] not in ("weight", "bias") else None


def _starts(key: str) -> tuple[int, ...]:
    """Return the offsets at which a key's last three, two and one dotted parts begin, or that of its last colon."""
    last = key.rfind(".")
    if last < 0:
        return (key.rfind(":"),) if ":" in key else ()
    before = key.rfind(".", 0, last)
    if before < 0:
        return (last,)
    first = key.rfind(".", 0, before)
    return (before, last) if first < 0 else (first, before, last)
