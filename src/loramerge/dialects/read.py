"""Recognising a file: which tool wrote it, for which model, and what each key means."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from ..architectures import ARCHITECTURES, NAME_FAMILY, Architecture
from ..architectures.names import Parts, whole
from ..errors import LayerError, LoRAMergeError, NotALoRAError, OptionError
from ..layers import UNKNOWN, Layer, build
from ..tensors import Shape, Tensor
from . import DIALECTS
from .alphas import stored
from .base import Dialect, table
from .repairs import repaired
from .suffixes import parse

SPLIT_QKV = r'"split_qkv":\s*"?[Tt]rue'
"""sd-scripts keeps alpha while it stacks ranks: https://github.com/kohya-ss/sd-scripts/issues/2204"""

UNUSED = r".*\.self_attn\.(q|k|v|out)_proj\.to_(?!\1$)(q|k|v|out)"
"""Layers that diffusers 0.16 and 0.17 saved and never applied."""


@dataclass(eq=False)
class Record:
    """The tensors that a file has under one stem."""

    stem: str
    style: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    """The key of each tensor, by role."""
    parts: Parts = ()
    """The modules that the stem means."""
    alpha: float | None = None
    """The alpha among the tensors."""
    layer: Layer | None = None
    """What the tensors make up, before it is known of which weight."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What a file turned out to be."""

    architecture: Architecture | None
    dialect: Dialect
    records: Mapping[str, Record]
    extras: tuple[str, ...]
    """Keys that are no part of a layer: embeddings and strays."""
    notes: tuple[str, ...]

    @property
    def style(self) -> str:
        """The commonest style of LoRA's own tensors."""
        counts = Counter(record.style for record in self.records.values() if record.style)
        return counts.most_common(1)[0][0] if counts else ""


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    architecture: str | None = None,
    dialect: str | None = None,
) -> Reading:
    """Recognise a LoRA by its keys and shapes.

    Args:
        tensors: The file's tensors by key.
        metadata: The file's own metadata; it decides between equal fits, and names the family where no shape fits.
        architecture: The family, if the caller knows it.
        dialect: The dialect, if the caller knows it.

    Raises:
        NotALoRAError: No layer is among the keys.
        LayerError: A layer is incomplete or its shapes disagree.
    """
    records, extras = _records(tensors)
    unused = [stem for stem in records if ".self_attn." in stem and re.fullmatch(UNUSED, stem)]
    for stem in unused:
        del records[stem]
    if not records:
        raise NotALoRAError(_not_a_lora(list(tensors)))
    for record in records.values():
        record.layer = _layer(record, tensors)
    names = _Names(records, extras)
    hinted = _hinted(metadata)
    found = ARCHITECTURES[architecture] if architecture else names.architecture(hinted) or names.stated(hinted)
    known = names.known(found) if architecture and found else len(records)
    if 2 * known <= len(records):
        raise OptionError(f"This is no LoRA of {architecture}: of {len(records)} layers {known} have a name in it.")
    notes = names.resolve(found)
    if unused:
        notes.append(
            f"{len(unused)} layers that diffusers 0.16 saved and never applied; only a verbatim copy keeps them"
        )
    arguments = metadata.get("ss_network_args", "")
    if arguments and re.search(SPLIT_QKV, arguments):
        notes.append(
            "trained with split_qkv: readers scale its fused layers by a third or a quarter, and so does loramerge"
        )
    chosen = DIALECTS[dialect] if dialect else names.dialect(found)
    for record in names.records.values():
        if not record.parts:
            record.parts = whole(chosen.free_module(record.stem))
    return Reading(found, chosen, names.records, tuple(names.extras), tuple(notes))


def _hinted(metadata: Mapping[str, str]) -> list[Architecture]:
    """The families that a file's metadata names."""
    hint = " ".join(metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version")).lower()
    return [a for a in ARCHITECTURES.values() if any(word in hint for word in a.hints)]


def _records(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Record], list[str]]:
    """Keys grouped by stem, and the keys that have no known suffix."""
    records: dict[str, Record] = {}
    rest: list[str] = []
    for key, spec in tensors.items():
        parsed = parse(key)
        if parsed is None:
            rest.append(key)
            continue
        stem, role, style = parsed
        if role == "scale" and len(spec.shape) == 1 and spec.shape[0] > 1:
            role = "set_weight"
        record = records.get(stem)
        if record is None:
            record = records[stem] = Record(stem)
        if role in record.keys:
            raise LayerError(f"{stem}: both {record.keys[role]!r} and {key!r} give its {role}")
        record.keys[role] = key
        record.style = record.style or style
    extras = _claim(rest, records)
    for stem in [stem for stem, record in records.items() if not record.keys.keys() - {"alpha", "scale"}]:
        extras += records.pop(stem).keys.values()
    return records, extras


def _claim(rest: list[str], records: Mapping[str, Record]) -> list[str]:
    """Give keys with an unknown suffix to the layer that they stand beside; the others are extras."""
    extras = []
    for key in rest:
        stem, _, end = key.rpartition(".")
        while stem and stem not in records:
            stem, _, more = stem.rpartition(".")
            end = f"{more}.{end}"
        if stem:
            records[stem].keys[f"{UNKNOWN}{end}"] = key
        else:
            extras.append(key)
    return extras


def _layer(record: Record, tensors: Mapping[str, Tensor]) -> Layer:
    held = {role: tensors[key] for role, key in record.keys.items() if role not in ("alpha", "scale")}
    try:
        record.alpha = stored(record.keys, tensors)
        return build(held, record.alpha, None)
    except LoRAMergeError as error:
        raise type(error)(f"{record.stem}: {error}. Keys: {', '.join(record.keys.values())}.") from None


def _not_a_lora(keys: list[str]) -> str:
    what = next((what for mark, what in OTHER_FILES if any(re.search(mark, key) for key in keys)), "something else")
    shown = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
    if not keys:
        return "The file holds no tensors, so it is not a LoRA."
    return (
        f"No LoRA layer among the file's {len(keys)} keys ({shown}); it looks like {what}. Wanted keys such as "
        "'….lora_down.weight', '….lora_A.weight' or '….hada_w1_a'."
    )


OTHER_FILES = (
    (r"^lllite_", "a ControlNet-LLLite"),
    (r"^(first_stage_model|cond_stage_model|model\.diffusion_model)\.", "a whole checkpoint"),
    (r"^(control_model|controlnet_|input_hint_block|zero_convs)", "a ControlNet"),
    (r"^(image_proj|ip_adapter)", "an IP-Adapter"),
    (r"^(emb_params|string_to_param|clip_[lg]$|<)", "a textual inversion"),
    (r"^(encoder|decoder)\.(down|up|mid)\.", "a VAE"),
    (r"^(down_blocks|double_blocks|transformer_blocks|input_blocks)\.", "a model's weights"),
)


class _Names:
    """The stems of one file, while their meaning is sought."""

    def __init__(self, records: dict[str, Record], extras: list[str]) -> None:
        self.records = records
        self.shapes = {stem: record.layer.shape for stem, record in records.items() if record.layer is not None}
        self.meant: dict[str, str] = {}
        self._fitting: dict[str, dict[str, Parts]] = {}
        self.extras = extras
        heads = {stem[:48] for stem in records}
        meant = {fix[0] for head in heads if (fix := repaired(head))}
        self.candidates = [
            d for d in DIALECTS.values() if any(h.startswith(d.begins) for h in heads | meant) and d.name != "other"
        ]

    def architecture(self, hinted: Sequence[Architecture]) -> Architecture | None:
        """The family in which most layers have a name and the right shape; among equal ones, one that is hinted at."""
        best: tuple[tuple[int, int], Architecture | None] = ((len(self.records) // 2, len(self.records)), None)
        for a in (*hinted, *(a for a in ARCHITECTURES.values() if a not in hinted and a.within is None)):
            fits = len(self.fitting(a)), self.own(a)
            if fits > best[0]:
                best = (fits, a)
            if min(fits) == len(self.records):
                break
        found = best[1]
        return self.distilled(found) if found else None

    def stated(self, hinted: Sequence[Architecture]) -> Architecture | None:
        """The family that the file says it is for, if that has all its names: a model of its own widths."""
        return next((a for a in hinted if self.known(a) == len(self.records)), None)

    def distilled(self, a: Architecture) -> Architecture:
        """A distilled family's LoRA fits the larger family too: it is told by covering the small one whole."""
        if self.coverage(a) == 1.0:
            return a
        small = [b for b in ARCHITECTURES.values() if b.within == a.name]
        for b in small:
            if len(self.fitting(b)) == len(self.records) and self.coverage(b) == 1.0:
                return b
        return a

    def coverage(self, a: Architecture) -> float:
        """Of the family's modules that are named like this file's, the share that the file has."""
        modules = {part.module for parts in self.fitting(a).values() for part in parts}
        counts = _leaves(a.name)
        return len(modules) / max(1, sum(counts[leaf] for leaf in {_leaf(module) for module in modules}))

    def fitting(self, a: Architecture) -> dict[str, Parts]:
        """The modules of every stem that has a name and the right shape in a family."""
        if a.name not in self._fitting:
            self._fitting[a.name] = self._fit(a)
        return self._fitting[a.name]

    def _fit(self, a: Architecture) -> dict[str, Parts]:
        found: dict[str, Parts] = {}
        left = set(self.records)
        for dialect in self.candidates:
            for names in dialect.tables:
                if not left:
                    return found
                known = table(names, a)
                here = {s: known[s] for s in left if s in known and _fits(self.shapes[s], known[s], a)}
                if dialect.numbered and len(here) < len(self.records):
                    continue
                found |= here
                left -= here.keys()
        for stem in left:
            fix = repaired(stem)
            parts = fix and self.lookup(a, fix[0])
            if fix and parts and _fits(self.shapes[stem], parts, a):
                found[stem] = parts
                self.meant[stem] = fix[0]
        return found

    def known(self, a: Architecture) -> int:
        """How many stems have a name in a family, whatever their shape."""
        return sum(self.lookup(a, (repaired(stem) or (stem,))[0]) is not None for stem in self.records)

    def own(self, a: Architecture) -> int:
        """How many stems have the very name that a dialect would write for the family."""
        left = set(self.fitting(a))
        for dialect in self.candidates:
            if left:
                left.difference_update(table(dialect.recognised_by or dialect.names, a))
        return len(self.fitting(a)) - len(left)

    def lookup(self, a: Architecture, stem: str) -> Parts | None:
        for dialect in self.candidates:
            for names in dialect.tables:
                if parts := table(names, a).get(stem):
                    return parts
        return None

    def resolve(self, a: Architecture | None) -> list[str]:
        """Give every record its modules; what is left is kept under its own name, or set aside."""
        if a is None:
            what = f"no known architecture has these {len(self.records)} modules; they keep the names of the file"
            return [f"{what}. If you know it, {NAME_FAMILY}"]
        notes: list[str] = []
        found = self.fitting(a)
        reasons = Counter(fix[1] for stem in self.meant if (fix := repaired(stem)))
        notes += [f"repaired {count} names: {why}" for why, count in reasons.items()]
        taken: dict[str, str] = {}
        unknown = []
        for stem in list(self.records):
            parts = found.get(stem) or self.misfit(a, stem)
            if parts is None:
                unknown.append(stem)
            for part in parts or ():
                if part.module in taken:
                    raise LayerError(f"{taken[part.module]} and {stem} both update the module {part.module}")
                taken[part.module] = stem
            self.records[stem].parts = parts or ()
        if unknown:
            notes.append(f"{len(unknown)} modules that {a.name} does not have, kept under their names: {unknown[0]} …")
        return notes

    def misfit(self, a: Architecture, stem: str) -> Parts | None:
        """A known name with another shape (FLUX control widens img_in): the module, unless it is fused."""
        if any(d.numbered for d in self.candidates):
            return None
        parts = self.lookup(a, stem)
        return parts if parts and len(parts) == 1 and parts[0].rows is None else None

    def dialect(self, a: Architecture | None) -> Dialect:
        """The dialect that has most of the names in the right style."""
        best, found = 0, DIALECTS["other"]
        for dialect in self.candidates:
            score = self.score(dialect, a)
            if score > best:
                best, found = score, dialect
            if best == 2 * len(self.records):  # as good as it gets
                break
        return found

    def score(self, dialect: Dialect, a: Architecture | None) -> int:
        styled = [s for s, r in self.records.items() if not r.style or r.style in dialect.styles]
        if a is None:
            return sum(stem.startswith(dialect.begins) for stem in styled)
        own = table(dialect.recognised_by or dialect.names, a)
        points = 2 * sum(stem in own for stem in styled)
        if points < 2 * len(styled):
            others = [own, *(table(names, a) for names in dialect.also_names)]
            for stem in (stem for stem in styled if stem not in own):
                points += any(name in other for other in others for name in (stem, self.meant.get(stem)))
        return points


@cache
def _leaves(architecture: str) -> Counter[str]:
    return Counter(_leaf(module) for module in ARCHITECTURES[architecture].shapes)


@cache
def _leaf(module: str) -> str:
    """A module's last names without its block: ``attn1.to_q``."""
    return ".".join(module.split(".")[-3:]) if module[-1].isdigit() else ".".join(module.split(".")[-2:])


def _fits(shape: Shape, parts: Parts, a: Architecture) -> bool:
    """Whether a layer of some shape updates the weights of these modules, a flattened kernel being allowed."""
    wanted = [a.shapes[part.module] for part in parts]
    if not shape:
        return True
    rows = sum(w[0] for w in wanted)
    if len(shape) == 1:
        return shape[0] == rows
    if shape[0] != rows or len(wanted[0]) < 2:
        return False
    return math.prod(shape[1:]) == math.prod(wanted[0][1:])
