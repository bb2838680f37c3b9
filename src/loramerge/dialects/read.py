"""Recognising a file: which tool wrote it, for which model, and what each key means."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import cache

from ..architectures import ARCHITECTURES, Architecture, last_numbers, titles
from ..architectures.hints import Named, named
from ..architectures.names import Parts, whole
from ..errors import FamilyError, LayerError, LoRAMergeError, NotALoRAError, OptionError
from ..layers import MAGNITUDES, UNKNOWN, Layer, LowRank, build
from ..tensors import Shape, Tensor
from . import DIALECTS
from .alphas import stored
from .base import Dialect, flat, table
from .repairs import repaired
from .suffixes import parse

SPLIT_QKV = r'"split_qkv":\s*"?[Tt]rue'
"""sd-scripts keeps alpha while it stacks ranks: https://github.com/kohya-ss/sd-scripts/issues/2204"""

UNUSED = r".*\.self_attn\.(q|k|v|out)_proj\.to_(?!\1$)(q|k|v|out)"
"""Layers that diffusers 0.16 and 0.17 saved and never applied."""


TEXT = re.compile(
    r"(?:module\.|_orig_mod\.|pipe\.)*(?:lora_te\d?_|text_encoders?[._/\d]|base_model\.model\.(?:text_model|encoder)\.|"
    r"clip_\w\.|t5\.|lycoris_text_model_|text_model\.|te\d?:)"
)
"""Beginnings of text encoders' stems, in any dialect."""

BEFORE = re.compile(
    r"(?:module\.|_orig_mod\.|pipe\.|lora_unet_+(?:unet_)?|lora_transformer_|lycoris_|oft_unet_|diffusion_model\.|model\.|"
    r"base_model\.model\.|unet[./]|transformer[./]|Hunyuan_video_I2V_lora_)*"
)
"""What stands before the denoiser's paths."""

INPUTS = (
    *("conv_in", "x_embedder", "x_embedder.proj", "img_in", "proj_in", "pos_embed.proj"),
    *("patch_embedding", "patch_embed.proj", "all_x_embedder.2-1"),
)
"""What takes the latents in: a model that takes more of them (FLUX control, inpainting, image to video) widens it."""

INSIDE = re.compile(r"attn|attention|\.ff|mlp|ffn|feed_forward")
"""Modules both of whose sides are widths of the model's own."""

FEW = 20
"""Of so many layers one may be of a part that no model of the family has: some trainers add one."""

MANY = 8
"""Modules that a file must have before all of a family's being there tells it from a larger one."""


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
    alike: tuple[str, ...] = ()
    """Other families that have these names and shapes."""

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
        metadata: The file's own metadata; it decides between families that are alike, and names the one of a
            model of its own widths.
        architecture: The family, if the caller knows it.
        dialect: The dialect, if the caller knows it.

    Raises:
        NotALoRAError: No layer is among the keys.
        LayerError: A layer is incomplete or its shapes disagree.
        FamilyError: The metadata names another family than the layers do.
    """
    records, extras = _records(tensors)
    rejoined = _rejoin(records)
    unused = [stem for stem in records if ".self_attn." in stem and re.fullmatch(UNUSED, stem)]
    for stem in unused:
        del records[stem]
    if not records:
        raise NotALoRAError(_not_a_lora(list(tensors)))
    for record in records.values():
        record.layer = _layer(record, tensors)
    _check_ranks(records)
    names = _Names(records, extras)
    said = named(metadata)
    fits = [names.told(architecture)] if architecture else names.families(said)
    found = fits[0] if fits else names.stated(said)
    broken = DIALECTS["kohya-broken"] if rejoined else None
    chosen = DIALECTS[dialect] if dialect else broken or names.dialect(found)
    notes = names.resolve(found, chosen)
    if found is None:
        notes.append(names.unknown(said))
    if unused:
        notes.append(
            f"{len(unused)} layers that diffusers 0.16 saved and never applied; only a verbatim copy keeps them"
        )
    if rejoined:
        notes.append(f"repaired {rejoined} names: dots in those of DoRA's magnitudes (diffusers' export for kohya)")
    arguments = metadata.get("ss_network_args", "")
    if arguments and re.search(SPLIT_QKV, arguments):
        notes.append(
            "trained with split_qkv: readers scale its fused layers by a third or a quarter, and so does loramerge"
        )
    alike = tuple(a.name for a in fits[1:])
    return Reading(found, chosen, names.records, tuple(names.extras), tuple(notes), alike)


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


def _rejoin(records: dict[str, Record]) -> int:
    """Give magnitudes whose stem has dots left in it to the layer that they are of; returns how many there were."""
    lone = [stem for stem, r in records.items() if "." in stem and r.keys.keys() <= MAGNITUDES]
    homes = {stem: home for stem in lone if (home := records.get(stem.replace(".", "_"))) is not None}
    for stem, home in homes.items():
        home.keys |= records.pop(stem).keys
    return len(homes)


def _claim(rest: list[str], records: Mapping[str, Record]) -> list[str]:
    """Give keys with an unknown suffix to the layer that they stand beside; the others are extras."""
    extras = []
    for key in rest:
        if ".base_layer." in key:  # of the model that PEFT wrapped, whole
            extras.append(key)
            continue
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
    held = {role: tensors[key] for role, key in record.keys.items() if role not in ("alpha", "scale", "reshape_weight")}
    try:
        record.alpha = stored(record.keys, tensors)
        return build(held, record.alpha, None)
    except LoRAMergeError as error:
        raise type(error)(f"{record.stem}: {error}. Keys: {', '.join(record.keys.values())}.") from None


def _check_ranks(records: Mapping[str, Record]) -> None:
    """Refuse a file most of whose ranks are above both sides of their weights: its factors are exchanged.

    A few may be: in a small layer of a file that has one rank for all.

    Raises:
        LayerError: They are.
    """
    plain = {stem: r.layer for stem, r in records.items() if isinstance(r.layer, LowRank) and r.layer.mid is None}
    above = {s: layer for s, layer in plain.items() if layer.rank > max(layer.shape[0], math.prod(layer.shape[1:]))}
    if 2 * len(above) > len(plain):
        stem, layer = next(iter(above.items()))
        raise LayerError(
            f"{stem}: rank {layer.rank} on a weight of {layer.shape}: lora_A (down) and lora_B (up) are exchanged, here and in "
            f"{len(above)} of {len(plain)} layers. Wanted lora_A of shape (rank, inputs) and lora_B of (outputs, rank). "
            "Way out: exchange them where the file was made."
        )


def _not_a_lora(keys: list[str]) -> str:
    what = next((what for mark, what in OTHER_FILES if any(re.search(mark, key) for key in keys)), "something else")
    shown = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
    if not keys:
        return "The file holds no tensors, so it is not a LoRA."
    return (
        f"No LoRA layer among the file's {len(keys)} keys ({shown}); it looks like {what}. Wanted keys such as "
        f"'….lora_down.weight', '….lora_A.weight' or '….hada_w1_a'.{BAKE if what in MODELS else ''}"
    )


MODELS = ("a whole checkpoint", "a model's weights")
BAKE = " To add a LoRA to a model: loramerge bake LORA --base MODEL -o NEW."


OTHER_FILES = (
    (r"^lora_controlnet$", "a Control-LoRA: a ControlNet, stored as factors, which loaders of ControlNets read"),
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
        self.text = {stem for stem in records if is_text(stem)}
        paths = sorted(_path(stem) for stem in records.keys() - self.text)
        self.sample = [paths[i] for i in (0, len(paths) // 2, -1)] if paths else []
        self.numbers = last_numbers(path.removesuffix("_") for path in paths)
        heads = {stem[:48] for stem in records}
        meant = {fix[0] for head in heads if (fix := repaired(head))}
        self.candidates = [
            d for d in DIALECTS.values() if any(h.startswith(d.begins) for h in heads | meant) and d.name != "other"
        ]

    def families(self, said: Named) -> list[Architecture]:
        """The families in which every layer has a name and the right shape: the likeliest, and those that are alike.

        Raises:
            FamilyError: The metadata names another family.
        """
        some = [a for a in ARCHITECTURES.values() if self.plausible(a)]
        fits = [a for a in some or ARCHITECTURES.values() if self.has_all(a)]
        fits = fits or [a for a in some if self.has_all(a, beside=len(self.records) // FEW)]
        hinted = [a for a in fits if a.name in said.families]
        if fits and not hinted and (said.families or said.unknown):
            raise FamilyError(self.contradiction(fits, said))
        fits = self.most_own(hinted or fits)
        whole_ones = [a for a in fits if self.covers(a)]
        return whole_ones or fits

    def told(self, name: str) -> Architecture:
        """The family that the caller names, if it can be; of a name for several sizes the one that fits.

        Raises:
            OptionError: Most layers have no name in it, or have shapes that it doesn't have.
        """
        a = ARCHITECTURES[name]
        sizes = [] if a.name == name else [b for b in ARCHITECTURES.values() if {*a.hints} & {*b.hints}]
        a = next((b for b in sizes if self.has_all(b)), a)
        count, known = len(self.records), self.known(a)
        if 2 * known <= count:
            raise OptionError(f"This isn't a LoRA of {a.name}: of {count} layers {known} have a name in it.")
        fits = len(self.fitting(a)) + sum(self.beside(a, stem) for stem in self.records if stem not in self.fitting(a))
        if 2 * fits <= count and not all(self.proportions(a)):
            stem = next(stem for stem in self.records if stem not in self.fitting(a) and self.lookup(a, stem))
            wanted = self.wanted(self.lookup(a, stem) or (), a)
            raise OptionError(
                f"This isn't a LoRA of {a.name}: of {count} layers {fits} have the shape of its weight; {stem} is for one "
                f"of {self.shapes[stem]}, and {a.name} has {wanted} there."
            )
        return a

    def plausible(self, a: Architecture) -> bool:
        """Whether the layers have names that could be the family's: a quick test before any table is built."""
        if any(d.numbered for d in self.candidates) or len(self.text) == len(self.records):
            return True
        last = a.outline.last
        if sum(number > last.get(name, number) for name, number in self.numbers.items()):
            return False
        return sum(path.startswith(_heads(a)) for path in self.sample) > 1

    def has_all(self, a: Architecture, beside: int = 0) -> bool:
        """Whether every layer is one of a family's, or may be there beside them.

        Args:
            a: The family.
            beside: How many layers may be of parts that a model of the family doesn't have.
        """
        found = self.fitting(a)
        for stem in self.records:
            if stem in found or self.beside(a, stem):
                continue
            if beside == 0 or self.lookup(a, stem) or _path(stem).startswith(_heads(a)):
                return False
            beside -= 1
        return bool(found)

    def beside(self, a: Architecture, stem: str) -> bool:
        """Whether a layer may be there though the family doesn't list it.

        It is that of a widened input (FLUX control has 128 channels), of a text encoder that the family
        doesn't list, or of a part that the model has beside its denoiser.
        """
        parts = self.lookup(a, stem)
        if parts is None:
            return (stem in self.text and len(self.text) < len(self.records)) or any(
                flat(part) in flat(stem) for part in a.also
            )
        return _is_widened(self.shapes[stem], parts, a)

    def most_own(self, families: list[Architecture]) -> list[Architecture]:
        """Those of which most layers have the very names that a dialect would write.

        Of a transformer's layers that tells nothing: some tools put diffusers' names behind kohya's prefix.
        """
        stems = set(self.records) if all(a.denoiser == "unet" for a in families) else self.text
        if len(families) < 2 or not stems:
            return families
        own = {a.name: self.own(a, stems) for a in families}
        return [a for a in families if own[a.name] == max(own.values())]

    def covers(self, a: Architecture) -> bool:
        """Whether the file has every module of the family that is named like one of its own, and many of them.

        Some blocks of a large model can be all of a small one's; a file of few layers tells nothing.
        """
        return len({part.module for parts in self.fitting(a).values() for part in parts}) >= MANY and (
            self.coverage(a) == 1.0
        )

    def stated(self, said: Named) -> Architecture | None:
        """The family that the file says it is for, if it has all its names: a model of its own widths."""
        hinted = [ARCHITECTURES[name] for name in said.families]
        known = [a for a in hinted if self.known(a) == len(self.records)]
        return next((a for a in known if any(fits := self.proportions(a)) and all(fits)), None)

    def proportions(self, a: Architecture) -> list[bool]:
        """Whether layers have the proportions of the family's: square where it has squares, and so on."""
        pairs = [
            (shape, self.wanted(parts, a))
            for stem, shape in self.shapes.items()
            if len(shape) > 1 and (parts := self.lookup(a, stem)) and INSIDE.search(parts[0].module)
        ]
        even = [(found, wanted) for found, wanted in pairs if max(wanted[:2]) % min(wanted[:2]) == 0]
        return [found[0] * wanted[1] == found[1] * wanted[0] for found, wanted in even]

    def wanted(self, parts: Parts, a: Architecture) -> Shape:
        """The shape of a weight of the family's."""
        shapes = [a.shapes[part.module] for part in parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def contradiction(self, fits: list[Architecture], said: Named) -> str:
        told = ", ".join(ARCHITECTURES[name].title for name in said.families) or said.unknown
        return (
            f"The metadata says {told} ({said.said}), and the names and shapes of all {len(self.records)} layers are "
            f"those of {titles(a.name for a in fits[:3])}. Way out: say which is right, --architecture {fits[0].name} "
            f"(in Python architecture={fits[0].name!r})."
        )

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
        return sum(self.lookup(a, stem) is not None for stem in self.records)

    def own(self, a: Architecture, stems: Set[str]) -> int:
        """How many of some stems have the very name that a dialect would write for the family."""
        left = set(stems & self.fitting(a).keys())
        count = len(left)
        for dialect in self.candidates:
            left -= table(dialect.recognised_by or dialect.names, a).keys()
        return count - len(left)

    def lookup(self, a: Architecture, stem: str) -> Parts | None:
        """The modules that a stem, or the one that was meant by it, has in a family, whatever its shape."""
        for name in (stem, *(fix[:1] if (fix := repaired(stem)) else ())):
            for dialect in self.candidates:
                for names in dialect.tables:
                    if parts := table(names, a).get(name):
                        return parts
        return None

    def resolve(self, a: Architecture | None, chosen: Dialect) -> list[str]:
        """Give every record its modules; what has none in the family is kept under its own name."""
        notes: list[str] = []
        taken: dict[str, str] = {}
        unknown = []
        found = self.fitting(a) if a else {}
        for stem, record in self.records.items():
            parts = (found.get(stem) or self.misfit(a, stem)) if a else None
            if parts is None:
                unknown.append(stem)
                fix = repaired(stem)
                self.meant |= {stem: fix[0]} if fix else {}
                parts = whole(chosen.free_module(self.meant.get(stem, stem)))
            for part in parts:
                if part.module in taken:
                    raise LayerError(f"{taken[part.module]} and {stem} both update the module {part.module}")
                taken[part.module] = stem
            record.parts = parts
        reasons = Counter(fix[1] for stem in self.meant if (fix := repaired(stem)))
        notes += [f"repaired {count} names: {why}" for why, count in reasons.items()]
        if a and unknown:
            notes.append(f"{len(unknown)} modules that {a.name} doesn't list, kept under their names: {unknown[0]} …")
        return notes

    def unknown(self, said: Named) -> str:
        """What to say of a file of no known family."""
        titles = [ARCHITECTURES[name].title for name in said.families] or [said.unknown] * bool(said.unknown)
        stated = f"; its metadata says {', '.join(titles)} ({said.said})" if titles else ""
        near = max(self._fitting.values(), key=len, default={})
        closest = ""
        if 2 * len(near) > len(self.records):
            name = next(name for name, fits in self._fitting.items() if fits is near)
            strange = next(stem for stem in self.records if stem not in near)
            closest = (
                f". Nearest is {ARCHITECTURES[name].title}, which has {len(near)} of them, and not {strange} "
                f"{self.shapes.get(strange, ())}"
            )
        return (
            f"of no model family that loramerge knows{stated}: its {len(self.records)} modules keep the names of the "
            f"file, and merge with those of files of the same tool{closest}"
        )

    def misfit(self, a: Architecture, stem: str) -> Parts | None:
        """A known name with another shape: the module, of which a widened input or a model of its own widths is."""
        if any(d.numbered for d in self.candidates):
            return None
        parts = self.lookup(a, stem)
        return parts and _scaled(parts, self.shapes[stem], a)

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
        """How many names a dialect has, those twice that it would write itself."""
        styled = [s for s, r in self.records.items() if not r.style or r.style in dialect.styles]
        if a is None:
            return sum((repaired(stem) or (stem,))[0].startswith(dialect.begins) for stem in styled)
        own = table(dialect.recognised_by or dialect.names, a)
        points = 2 * sum(stem in own for stem in styled)
        if points < 2 * len(styled):
            others = [own, *(table(names, a) for names in dialect.also_names)]
            for stem in (stem for stem in styled if stem not in own):
                points += any(name in other for other in others for name in (stem, self.meant.get(stem)))
        return points


def _path(stem: str) -> str:
    """What follows the prefix of a denoiser's stem, with underscores in the place of dots, and one at the end."""
    return flat(BEFORE.sub("", stem, count=1)) + "_"


@cache
def _heads(a: Architecture) -> tuple[str, ...]:
    return tuple(f"{head}_" for head in (*a.outline.own, *a.outline.others, *map(flat, a.also)))


@cache
def _leaves(architecture: str) -> Counter[str]:
    return Counter(_leaf(module) for module in ARCHITECTURES[architecture].shapes)


@cache
def _leaf(module: str) -> str:
    """A module's last names without its block: ``attn1.to_q``."""
    return ".".join(module.split(".")[-3:]) if module[-1].isdigit() else ".".join(module.split(".")[-2:])


def is_text(stem: str) -> bool:
    """Whether a stem is that of a text encoder in any dialect."""
    return TEXT.match(stem) is not None


def _is_widened(shape: Shape, parts: Parts, a: Architecture) -> bool:
    """Whether a layer is for a model's input, made for more channels than the family's."""
    module = parts[0].module
    if len(parts) > 1 or module.partition(".")[2] not in INPUTS:
        return False
    wanted = a.shapes[module]
    return len(shape) > 1 and shape[0] == wanted[0] and math.prod(shape[1:]) > math.prod(wanted[1:])


def _scaled(parts: Parts, shape: Shape, a: Architecture) -> Parts | None:
    """The modules of a weight of a model with widths of its own, their rows in the proportions of the family's."""
    if all(part.rows is None for part in parts) or not shape:
        return parts
    rows = sum(a.shapes[part.module][0] for part in parts)
    if any(n * shape[0] % rows for part in parts for pair in part.rows or () for n in pair):
        return None
    ranges = [tuple((i * shape[0] // rows, j * shape[0] // rows) for i, j in part.rows or ()) for part in parts]
    return tuple(part._replace(rows=found or None) for part, found in zip(parts, ranges, strict=True))


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
