"""The check of a LoRA for another program: what that takes of it, at what strength, and what it leaves out.

All knowledge of readers is in one table, `files.dialects.readers`; where that is silent, the answer is that nothing is known.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

from ..checkpoints.models import Checkpoint, open_checkpoint
from ..errors import span
from ..files.architectures import ARCHITECTURES, STOPS, Architecture
from ..files.dialects import DIALECTS
from ..files.dialects.base import table
from ..files.dialects.readers import READERS, Reader, dropped
from ..files.dialects.suffixes import parse
from ..files.lora import LoRA
from ..files.reading import Source, open

Verdict = Literal["yes", "in part", "no", "unknown"]


@dataclass(frozen=True)
class Finding:
    """A reason why a reader doesn't take some modules as they are meant."""

    what: str
    modules: tuple[str, ...]
    loads: bool = False
    """True if the modules load all the same, but act at another strength."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The answer for one LoRA and one reader."""

    name: str
    reader: str
    dialect: str
    families: tuple[str, ...]
    layers: int
    findings: tuple[Finding, ...]
    unknown: tuple[str, ...]
    """Reasons why the table doesn't say all about this file."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """The modules that don't act as they are meant."""
        return tuple(dict.fromkeys(module for finding in self.findings for module in finding.modules))

    @property
    def verdict(self) -> Verdict:
        """``yes`` if all of it loads, ``in part``, ``no`` if nothing does, and ``unknown``."""
        left_out = {module for finding in self.findings if not finding.loads for module in finding.modules}
        if self.layers and len(left_out) == self.layers:
            return "no"
        if self.unknown:
            return "unknown"
        return "in part" if self.findings else "yes"

    def __str__(self) -> str:
        """Say the answer in a line."""
        reader = f"{self.name} in {self.reader}"
        if self.verdict == "unknown":
            return f"{reader}: can't tell"
        taken = self.layers - len(self.ignored)
        strength = "" if self.verdict == "no" else " at the strength that the file says"
        return f"{reader}: {self.verdict}, {taken} of {self.layers} layers load{strength}"


def check(lora: LoRA | Source, reader: str, *, base: "Checkpoint | str | os.PathLike[str] | None" = None) -> Check:
    """Check whether a LoRA loads in another program.

    Args:
        lora: A LoRA as it was read, or what `open` takes; only its header is read.
        reader: ``"comfyui"``, ``"diffusers"``, ``"a1111"``, ``"kohya"`` (sd-scripts) or ``"peft"``.
        base: A base model, or its path: then modules that it lacks, or has in another shape, are found too.

    Raises:
        FileError: The LoRA or the model can't be read.
        NotALoRAError: The file isn't a LoRA.
        OptionError: The reader is unknown.

    Example:
        >>> from loramerge.testing import random_lora
        >>> print(check(random_lora("sdxl", dialect="diffusers"), "comfyui"))
        random-0 in ComfyUI: in part, 8 of 16 layers load at the strength that the file says
    """
    chosen = READERS[reader]
    with ExitStack() as stack:
        opened = lora if isinstance(lora, LoRA) else stack.enter_context(open(lora))
        model = base
        if isinstance(base, str | os.PathLike):
            model = stack.enter_context(open_checkpoint(base, likely=opened.families))
        if isinstance(model, Checkpoint) and model.architecture in opened.families:
            opened = replace(opened, architecture=model.architecture, alike=())
        misfits = () if not isinstance(model, Checkpoint) else tuple(_misfits(opened, model))
        other = _other_names(opened) if opened.dialect in chosen.dialects else []
        ignored = () if other else tuple(_dropped(opened, chosen))
        return Check(
            name=opened.name,
            reader=chosen.title,
            dialect=opened.dialect,
            families=opened.families,
            layers=len(opened),
            findings=(*ignored, *_strength(opened, chosen), *misfits),
            unknown=tuple(_unknown(opened, chosen, other, ignored)),
        )


def _dropped(lora: LoRA, reader: Reader) -> Iterable[Finding]:
    """Yield what the table says of a file, if the reader was run with its dialect and family, and the family is clear."""
    unclear = len({*_by_family(lora, reader).values()}) > 1
    if unclear or lora.dialect not in reader.dialects or not reader.families(_family(lora)):
        return
    for drop, modules in dropped(lora.dialect, lora.architecture, lora.layouts, lora.style):
        if drop.reader == reader.title:
            stops = drop.does == STOPS
            yield Finding(f"{drop.reader} {drop.does} {drop.what}", tuple(lora if stops else modules))
    if reader.title == "PEFT" and lora.dialect == "peft" and lora.origin is not None and not lora.origin.config:
        yield Finding("PEFT stops without an adapter_config.json beside the file", tuple(lora))


def _strength(lora: LoRA, reader: Reader) -> Iterable[Finding]:
    """Yield the layers that act at another strength, as their scale isn't among the tensors."""
    if reader.takes_headers or lora.origin is None or not lora.origin.scales_beside:
        return
    scales = {
        module: layer.own_alpha / (layer.own_rank or 1) for module, layer in lora.layouts.items() if layer.own_alpha
    }
    wrong = {module: scale for module, scale in scales.items() if abs(scale - 1) > 1e-6}
    if wrong:
        times = span(min(1 / abs(s) for s in wrong.values()), max(1 / abs(s) for s in wrong.values()))
        yield Finding(
            f"{reader.title} ignores the scale in the header, so layers act {times} times as strong",
            tuple(wrong),
            loads=True,
        )


def _misfits(lora: LoRA, model: Checkpoint) -> Iterable[Finding]:
    """Yield the modules that a model lacks or has in another shape."""
    lacks = tuple(module for module in lora if module not in model)
    if lacks:
        yield Finding(f"{model.name} has no module of these names", lacks)
    other = [m for m in lora if m in model and not lora.layout(m).fits(model[m].shape)]
    if other:
        shapes = f"{lora.layout(other[0]).shape} and {model[other[0]].shape}"
        yield Finding(f"{model.name} has weights of another shape ({shapes})", tuple(other))


def _unknown(lora: LoRA, reader: Reader, other: Sequence[str], ignored: Sequence[Finding]) -> Iterable[str]:
    """Yield the reasons why the table doesn't say all about a file.

    Args:
        lora: The file.
        reader: The program.
        other: Names in the file that the dialect isn't written with.
        ignored: The table's findings.
    """
    family = _family(lora)
    if lora.dialect not in reader.dialects:
        yield f"{reader.title} was not run with the dialect {lora.dialect}"
        return
    if family is None and lora.dialect != "peft":
        yield "the model family is unknown"
        return
    if not reader.families(family):
        yield f"{reader.title} was not run with the family {lora.architecture}"
    told = _by_family(lora, reader)
    if len({*told.values()}) > 1:
        yield (
            f"the file may be for {' or '.join(told)}, which {reader.title} reads differently. Way out: name the family "
            "(--architecture, or open(…, architecture=…)), or the base model"
        )
    if other:
        yield f"{reader.title} was not run with names such as {other[0]}"
    written = DIALECTS[lora.dialect].style_for and family and DIALECTS[lora.dialect].written_style(family)
    if written and lora.style and lora.style != written and reader.title != "ComfyUI":
        yield f"{reader.title} was not run with this spelling of the tensors' names ({lora.style}, not {written})"
    alphas = lora.style == "peft" and any(layer.own_alpha is not None for layer in lora.layouts.values())
    if alphas and lora.dialect == "comfyui" and not reader.with_alphas and not ignored:
        yield f"{reader.title} was not run with alphas beside lora_A in comfyui"
    outside = [module for module in lora if not reader.modules.match(module)]
    if outside:
        yield f"{reader.title} was run with the layers of blocks only; {len(outside)} are outside of them: {outside[0]} …"


def _other_names(lora: LoRA) -> list[str]:
    """Return the names in a file that its dialect allows, but doesn't write for the family."""
    family = _family(lora)
    if lora.origin is None or family is None:
        return []
    names = table(DIALECTS[lora.dialect].names, family)
    parsed = [found for key in lora.origin.tensors if key not in lora.extras and (found := parse(key))]
    return [found.stem for found in parsed if found.stem not in names]


def _family(lora: LoRA) -> Architecture | None:
    return ARCHITECTURES[lora.architecture] if lora.architecture else None


def _by_family(lora: LoRA, reader: Reader) -> Mapping[str, tuple[str, ...]]:
    """Return the modules that are left out, for each family that the file may be for."""
    rows = {family: dropped(lora.dialect, family, lora.layouts, lora.style) for family in lora.families}
    return {
        family: tuple(m for drop, modules in found if drop.reader == reader.title for m in modules)
        for family, found in rows.items()
    }
