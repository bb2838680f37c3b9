"""Blocks of a model, and the WebUI's vectors with one weight per block.

Source: https://github.com/hako-mikan/sd-webui-lora-block-weight
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache

from ...errors import OptionError
from ..expressions import Effort, Expression
from . import ARCHITECTURES, Kin, sgm


def _numbered(prefix: str, numbers: Sequence[int]) -> list[str]:
    return [f"{prefix}{n:02d}" for n in numbers]


FLUX_BLOCKS = [*_numbered("D", range(19)), *_numbered("S", range(38))]

VECTORS: Mapping[Kin, Mapping[int, list[str]]] = {
    Kin.SD: {
        17: ["BASE", *_numbered("IN", (1, 2, 4, 5, 7, 8)), "MID", *_numbered("OUT", range(3, 12))],
        26: ["BASE", *_numbered("IN", range(12)), "MID", *_numbered("OUT", range(12))],
    },
    Kin.SDXL: {
        12: ["BASE", *_numbered("IN", (4, 5, 7, 8)), "MID", *_numbered("OUT", range(6))],
        20: ["BASE", *_numbered("IN", range(9)), "MID", *_numbered("OUT", range(9))],
    },
    Kin.FLUX: {
        57: FLUX_BLOCKS,
        58: ["BASE", *FLUX_BLOCKS],
        61: ["CLIP", "T5", "IN", *FLUX_BLOCKS, "OUT"],
    },
}
"""Names of the blocks that the WebUI's vectors have numbers for, by length; BASE is the text encoders."""

LAST = ("proj_out", "norm_out", "final_layer", "all_final_layer", "scale_shift_table", "audio_proj_out")
"""Beginnings of the modules behind a transformer's last block."""


def block(module: str, architecture: str | None = None) -> str:
    """Return the block that a module belongs to: ``IN04``, ``MID``, ``OUT11``, ``D18``, ``S37``, ``BASE``, ``CLIP`` …

    In a model without such names a block is called by its path: ``blocks.7``, ``double_blocks.12``.
    The result is ``-`` for a module outside of all blocks, such as the time embedding.
    """
    component, _, path = module.partition(".")
    if component.startswith("text"):
        if architecture and ARCHITECTURES[architecture].kin is Kin.FLUX:
            return "CLIP" if component == "text_encoder" else "T5"
        return "BASE"
    if component == "unet":
        return _unet_block(path)
    if match := re.match(r"(single_)?transformer_blocks\.(\d{1,9})\.", path):
        return f"{'S' if match[1] else 'D'}{int(match[2]):02d}"
    if match := re.match(r"([a-z][a-z_.]*?[a-z])[._](\d{1,9})(?=[._])", path):
        return f"{match[1]}.{match[2]}"
    if component == "transformer" and architecture is not None:
        return "OUT" if path.startswith(LAST) else "IN"
    return "-"


def _unet_block(path: str) -> str:
    try:
        section, number, *_ = sgm.block(path).split(".")
    except (KeyError, ValueError, IndexError):
        return "-"
    if section == "middle_block":
        return "MID"
    names = {"input_blocks": "IN", "output_blocks": "OUT"}
    return f"{names[section]}{int(number):02d}" if section in names else "-"


def position(component: str, block: str) -> tuple[bool, str, int, str]:
    """Return a sorting key: the denoiser before the text encoders, its blocks in the order in which data passes them."""
    order = ("-", "IN", "D", "S", "MID", "OUT")
    name = block.rstrip("0123456789")
    place = order.index(name) if name in order else order.index("MID") if "." in block else 0
    return component.startswith("text"), component, place, f"{name}{int(block[len(name) :] or 0):04d}"


def vector(numbers: Sequence[float], architecture: str | None) -> dict[str, float]:
    """Return the weight of each block, from a vector of a length that the family uses.

    Raises:
        OptionError: The family has no vectors of that length.
    """
    if architecture is None:
        raise OptionError("There are no block vectors for an unknown architecture; use patterns.")
    family = ARCHITECTURES[architecture]
    lengths = vectors(family.name)
    if len(numbers) not in lengths:
        wanted = ", ".join(map(str, lengths))
        raise OptionError(f"A block vector of {len(numbers)} numbers; {family.title} takes {wanted}.")
    weights = dict(zip(lengths[len(numbers)], numbers, strict=True))
    if family.kin is Kin.FLUX and "BASE" in weights:
        weights |= {"CLIP": weights["BASE"], "T5": weights.pop("BASE")}
    return weights


@cache
def vectors(architecture: str) -> Mapping[int, list[str]]:
    """Return the names of the blocks that a family's vectors have numbers for, by length.

    Where the WebUI has no vectors, there is one number for each block in the order in which the model lists them, with
    the text encoders in front if there are any, and with what is before and behind the blocks.
    """
    family = ARCHITECTURES[architecture]
    if family.kin and family.kin in VECTORS:
        return VECTORS[family.kin]
    found = dict.fromkeys(block(module, architecture) for module in family.shapes)
    names = sorted(found.keys() - {"-", "BASE"}, key=list(found).index)
    if family.denoiser == "unet":
        names.sort(key=lambda name: position("", name))
    inside = [name for name in names if family.denoiser == "unet" or name not in ("IN", "OUT")]
    base = ["BASE"] * ("BASE" in found)
    ends = [[end] * (end in names and end not in inside) for end in ("IN", "OUT")]
    return {len(some): some for some in (inside, base + inside, base + ends[0] + inside + ends[1])}


def depth(module: str, architecture: str) -> float:
    """Return how deep a module lies in the denoiser: 0 in its first block, 1 in its last one.

    The text encoders and what is before the first block are at 0, what is behind the last one at 1.
    """
    order, name = _order(architecture), block(module, architecture)
    if name in order:
        return order[name] / max(1, len(order) - 1)
    return 1.0 if name == "OUT" else 0.0


@cache
def _order(architecture: str) -> Mapping[str, int]:
    """Number a denoiser's blocks in the order in which data passes them."""
    longest = max(vectors(architecture).values(), key=len)
    inside = [name for name in longest if name not in ("BASE", "CLIP", "T5", "IN", "OUT")]
    return {name: i for i, name in enumerate(inside)}


class Selector:
    """Patterns that select modules.

    A pattern may be a component (``text_encoder``), a block (``OUT03``), a glob over the module's name
    (``unet.up_blocks.*``) or, after ``re:``, a regular expression to be found in it.

    Args:
        patterns: The patterns.
        architecture: The modules' family, which names the blocks.

    Raises:
        OptionError: A regular expression isn't one, or would take too long.
    """

    def __init__(self, patterns: Iterable[str], architecture: str | None = None) -> None:
        effort = Effort()
        self.patterns = {p: Expression(p[3:], effort) if p.startswith("re:") else None for p in patterns}
        self.architecture = architecture

    def matching(self, module: str) -> list[str]:
        """Return the patterns that match a module."""
        names = (module, block(module, self.architecture))
        component = module.partition(".")[0]

        def matches(pattern: str, expression: Expression | None) -> bool:
            if expression:
                return expression.found_in(module)
            return pattern == component or any(fnmatchcase(name, pattern) for name in names)

        return [pattern for pattern, expression in self.patterns.items() if matches(pattern, expression)]


def offered(modules: Iterable[str], architecture: str | None = None) -> str:
    """Write a sentence with patterns that match some of the modules: blocks, and globs of their names' first two parts."""
    names = list(modules)
    if not names:
        return "It has no modules."
    present = dict.fromkeys(block(module, architecture) for module in names)
    known = sorted((name for name in present if name != "-"), key=lambda name: position("", name))
    globs = dict.fromkeys(".".join([*module.split(".")[:2], "*"]) for module in names if module.count(".") > 1)
    kinds = {"blocks": _runs(known), "sections": list(globs)[:SECTIONS]}
    listed = [f"{kind} {', '.join(values)}" for kind, values in kinds.items() if values]
    return f"Patterns that do: {'; '.join(listed)}." if listed else f"Its modules are such as {names[0]}."


def _runs(names: Sequence[str]) -> list[str]:
    """Shorten sorted names: more than three in a row become ``D00 to D18``."""
    groups: list[list[str]] = []
    for name in names:
        last = groups[-1][-1] if groups else ""
        follows = name[-2:].isdigit() and last[:-2] == name[:-2] and int(last[-2:]) + 1 == int(name[-2:])
        groups[-1].append(name) if follows else groups.append([name])
    return [part for run in groups for part in (run if len(run) < 4 else [f"{run[0]} to {run[-1]}"])]


SECTIONS = 8
"""The most globs that a message lists: a LoRA of an unknown family may have one for each module."""
