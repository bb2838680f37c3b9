"""A LoRA: what a file means, whatever it was called."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .blocks import matches
from .dialects import alphas
from .dialects.alphas import Config
from .dialects.config import about_model
from .dialects.read import Reading, Record, read
from .errors import LoRAMergeError, OptionError
from .layers import Layer, LowRank, alpha_of, build
from .storage.awaited import Awaited
from .storage.reader import SafetensorsFile
from .tensors import Array, Held, Shape, Tensor, check_finite, is_torch

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Origin:
    """The tensors that a LoRA was read from, under their own keys."""

    tensors: Mapping[str, Tensor]
    dialect: str
    config: Mapping[str, Config] = field(default_factory=dict)
    """PEFT's configuration, by component (``""`` for the directory's own)."""
    scales_beside: bool = False
    """Whether a scale stands beside the tensors: in the header, or in the configuration."""
    layouts: Mapping[str, Layer] = field(default_factory=dict)
    """The layouts as read: a LoRA with others was changed."""
    source: str | None = None
    """The file's or directory's name, or ``hf://org/repo@revision``; None for a state dict."""
    forced: Mapping[str, str] = field(default_factory=dict)
    """The architecture and the dialect, where they were given and not told from the keys."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoRA(Mapping[str, Layer]):
    """One file's update of a model: an ordered mapping of modules to layers.

    Modules have diffusers' names with the component in front, such as
    ``unet.mid_block.attentions.0.proj_in``.  A layer is read, or computed, when it is asked
    for; its shape, rank and kind are known before (`layout`).

    Example:
        >>> from loramerge.testing import random_lora
        >>> lora = random_lora("sd15", rank=4)
        >>> lora["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].rank
        4
    """

    name: str
    architecture: str | None
    """Name of the model family; None when it is unknown."""
    dialect: str
    """Name of the dialect that the file is in, or would be saved in."""
    style: str = ""
    """How its file spells LoRA's own tensors, see `dialects.suffixes`; empty for one that was made in memory."""
    layouts: Mapping[str, Layer]
    """Every module's layer, of which the tensors may be stand-ins with shapes only."""
    compute: Callable[[str], Layer] | None = None
    """Gives a module's layer with its values; None when the layouts hold them."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Config] = field(default_factory=dict)
    """What PEFT's configuration says of the model that it was trained on, by component (``""`` for any)."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that belong to no layer: embeddings, strays.  Kept, never merged into a weight."""
    notes: tuple[str, ...] = ()
    """What was repaired or is unusual."""
    dtype: str | None = None
    """Dtype that saving uses unless told: None keeps every tensor's own."""
    here: bool = False
    """Whether layers must be computed in this process, because someone is told of it."""
    origin: Origin | None = field(default=None, repr=False)

    def __getitem__(self, module: str) -> Layer:
        if module not in self.layouts:
            raise KeyError(module)
        return self.compute(module) if self.compute else self.layouts[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layouts)

    def __len__(self) -> int:
        return len(self.layouts)

    def __contains__(self, module: object) -> bool:
        return module in self.layouts

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return (
            f"LoRA({self.name!r}, {self.architecture or 'unknown architecture'}, {self.dialect}, "
            f"{len(self)} modules, {self.summary('rank')})"
        )

    def __enter__(self) -> "LoRA":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file, if one is open."""
        if self.origin and isinstance(self.origin.tensors, SafetensorsFile):
            self.origin.tensors.close()

    def layout(self, module: str) -> Layer:
        """The module's layer without its values: kind, shape, rank, alpha."""
        return self.layouts[module]

    def summary(self, what: str) -> str:
        """The values of a layout's attribute over all modules: ``"rank 4 to 16"``."""
        values = {v for layer in self.layouts.values() if (v := getattr(layer, what, None)) is not None}
        if not values:
            return f"no {what}"
        low, high = min(values), max(values)
        return f"{what} {low:g}" if low == high else f"{what} {low:g} to {high:g}"

    def norm(self) -> float:
        """Frobenius norm of the whole update, over all modules."""
        return math.sqrt(sum(layer.norm() ** 2 for layer in self.values()))

    def select(self, *patterns: str) -> "LoRA":
        """The part whose modules match one of the patterns, as in weights: ``"unet.*attn2*"``, ``"OUT03"``."""
        others = set(self.others(*patterns))
        return self._keep([m for m in self if m not in others], patterns)

    def exclude(self, *patterns: str) -> "LoRA":
        """All but the modules that match one of the patterns."""
        kept = self.others(*patterns)
        if patterns and len(kept) == len(self):
            raise OptionError(f"No module of {self.name} matches {' or '.join(patterns)}. {_some(self)}")
        return self._keep(kept, patterns)

    def others(self, *patterns: str) -> list[str]:
        """The modules that match none of the patterns."""
        return [m for m in self if not any(matches(p, m, self.architecture) for p in patterns)]

    def part(self, modules: Iterable[str]) -> "LoRA":
        """The LoRA of some of the modules, maybe of none."""
        layouts = {m: self.layouts[m] for m in modules}
        return (
            self if len(layouts) == len(self) else replace(self, layouts=layouts, origin=None, compute=self.__getitem__)
        )

    def _keep(self, modules: list[str], patterns: tuple[str, ...]) -> "LoRA":
        if not modules:
            raise OptionError(f"No module of {self.name} is left by {' '.join(patterns)}. {_some(self)}")
        return self.part(modules)

    @property
    def as_read(self) -> bool:
        """Whether this is what was read, unchanged."""
        return self.origin is not None and self.origin.layouts is self.layouts

    @cached_property
    def sha256(self) -> str:
        """What tells these tensors from others: the SHA-256 of the safetensors file of them alone.

        Of a file, every tensor under its own key; the header's strings don't count.  Of a LoRA that
        was changed or made in memory, every layer's tensors as ``module.role``.  Scales that stand
        beside the tensors are taken in as the entry ``alphas``.  Reads every tensor.
        """
        from .storage.writer import sha256

        if self.origin and self.as_read:
            return sha256(self.origin.tensors, _alphas(self.layouts) if self.origin.scales_beside else {})
        layers = dict(self.items())
        held = {f"{m}.{role}": Held(array) for m, layer in layers.items() for role, array in layer.tensors().items()}
        return sha256({**held, **self.extras}, _alphas(layers))

    def in_memory(self) -> "LoRA":
        """The same LoRA with every layer computed and every tensor read."""
        if isinstance(self.metadata, Awaited):
            self.metadata.begin()
        layouts = dict(self.items())
        same = self.as_read
        return replace(
            self,
            layouts=layouts,
            compute=None,
            metadata=dict(self.metadata),
            extras={key: Held(tensor.read()) for key, tensor in self.extras.items()},
            origin=replace(self.origin, layouts=layouts) if self.origin and same else None,
        )

    def state_dict(self, dialect: str | None = None, dtype: str | None = None) -> dict[str, "torch.Tensor"]:
        """The LoRA's tensors under a dialect's keys, as torch tensors.

        Args:
            dialect: Name of a dialect that can be written; the LoRA's own by default.
            dtype: ``"float32"``, ``"float16"`` …; every tensor's own by default.

        Returns:
            Copies: what a reader does to them (diffusers scales some in place) stays with it.

        Raises:
            DialectError: The dialect can't hold a layer.
        """
        from .dialects.write import state_dict

        return {key: _to_torch(array).clone() for key, array in state_dict(self, dialect, dtype).items()}


def without(loras: Sequence[LoRA], patterns: Sequence[str]) -> list[LoRA]:
    """The LoRAs without the modules that match one of the patterns, as in weights.

    Raises:
        OptionError: There are patterns, and no module of any LoRA matches.
    """
    kept = [lora.part(lora.others(*patterns)) for lora in loras]
    if patterns and sum(map(len, kept)) == sum(map(len, loras)):
        raise OptionError(f"No module matches the pattern {' or '.join(patterns)}, such as {next(iter(loras[0]))}.")
    return kept


def _some(lora: LoRA) -> str:
    return f"Its modules are such as {next(iter(lora))}."


def _alphas(layers: Mapping[str, Layer]) -> dict[str, str]:
    found = {module: alpha_of(layer) for module, layer in layers.items()}
    return {"alphas": json.dumps({module: None if alpha is None else float(alpha) for module, alpha in found.items()})}


def _to_torch(array: Array) -> "torch.Tensor":
    import numpy as np
    import torch

    if isinstance(array, torch.Tensor):
        return array
    array = np.ascontiguousarray(array).reshape(array.shape)  # which makes a scalar an array of one
    if array.dtype.name.startswith(("bfloat16", "float8")):
        return torch.from_numpy(array.view(f"u{array.itemsize}").copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def in_one_library(layers: Sequence[Layer], device: str | None = None) -> list[Layer]:
    """Layers whose tensors are all numpy's or all torch's: torch's where one is, or a device is named."""
    if "torch" not in sys.modules and device is None:
        return list(layers)
    torches = [is_torch(tensor) for layer in layers for tensor in layer.tensors().values()]
    if device is None and (all(torches) or not any(torches)):
        return list(layers)

    def moved(tensor: Array) -> Array:
        found = _to_torch(tensor)
        return found if device is None else found.to(device)

    return [layer.map(moved) for layer in layers]


def from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    name: str,
    *,
    config: Mapping[str, Config] | None = None,
    architecture: str | None = None,
    dialect: str | None = None,
) -> LoRA:
    """The LoRA that tensors, under the keys of any dialect, mean.

    Args:
        tensors: Stored or held tensors by key.
        metadata: The file's metadata.
        name: What messages call it: the file's name.
        config: PEFT's ``adapter_config.json``, by component.
        architecture: Name of the family, where the keys leave it open.
        dialect: Name of the dialect, where the keys leave it open.

    Raises:
        NotALoRAError: No layer is among the keys.
        LayerError: A layer is incomplete, or its tensors disagree.
    """
    try:
        reading = read(tensors, metadata, architecture=architecture, dialect=dialect)
        scales = alphas.configs(metadata, config or {})
    except LoRAMergeError as error:
        raise type(error)(f"{name}: {error}") from None
    reader = _Reader(name, reading, tensors, scales)
    notes = list(reading.notes)
    if not scales and any("base_model.model." in key for key in tensors):
        notes.append(
            "PEFT's adapter_config.json is missing, so the strength is a guess (alpha = rank, scale 1): "
            "put the one of the same download beside the file, or name the folder of both"
        )
    saved = [each["modules_to_save"] for each in scales.values() if isinstance(each.get("modules_to_save"), list)]
    if whole := dict.fromkeys(str(part) for parts in saved for part in parts):
        notes.append(
            f"trained with PEFT's modules_to_save: the whole weights of {', '.join(whole)} are no part of the LoRA, "
            "are kept as they are, and are in no merge or sum"
        )
    order = list(reading.architecture.shapes) if reading.architecture else []
    modules = dict.fromkeys([*(m for m in order if m in reader.parts), *reader.parts])
    layouts = {m: reader.part(m, reader.layout(reader.parts[m][1])) for m in modules}
    beside = any(r.alpha is None and reader.configured(r) is not None for r in reading.records.values())
    return LoRA(
        name=name,
        architecture=reading.architecture.name if reading.architecture else None,
        dialect=reading.dialect.name,
        style=reading.style,
        layouts=layouts,
        compute=reader.layer,
        metadata=dict(metadata),
        configs=about_model(scales),
        extras={key: tensors[key] for key in reading.extras},
        notes=tuple(notes),
        origin=Origin(tensors, reading.dialect.name, dict(config or {}), beside, layouts),
    )


class _Reader:
    """Layers from the records of one file."""

    def __init__(
        self, name: str, reading: Reading, tensors: Mapping[str, Tensor], config: Mapping[str, Config]
    ) -> None:
        self.name = name
        self.records = reading.records
        self.tensors = tensors
        self.config = config
        self.architecture = reading.architecture
        self.parts = {part.module: (part, record) for record in reading.records.values() for part in record.parts}
        self.source = object()
        self._recent: dict[str, Layer] = {}
        self._layouts: dict[str, Layer] = {}
        self._alphas: dict[str, float | None] = {}

    def whole(self, stem: str) -> Layer:
        """The layer of a stem; a fused one is asked for once a part, so the last few are kept."""
        if len(self.records[stem].parts) == 1:
            return self._whole(stem)
        found = self._recent.get(stem) or self._whole(stem)
        self._recent = {**dict(list(self._recent.items())[-3:]), stem: found}
        return found

    def layer(self, module: str) -> Layer:
        return self.part(module, self.whole(self.parts[module][1].stem))

    def part(self, module: str, whole: Layer) -> Layer:
        part, record = self.parts[module]
        return whole if part.rows is None else whole.rows(part.rows, (self.source, record.stem))

    def layout(self, record: Record) -> Layer:
        if record.stem not in self._layouts:
            self._layouts[record.stem] = self._named(record, self._layout)
        return self._layouts[record.stem]

    def _layout(self, record: Record) -> Layer:
        layer, weight = record.layer, self.weight(record)
        value = self.configured(record) if record.alpha is None else record.alpha
        self._alphas[record.stem] = value
        if layer is not None and layer.shape == weight:
            if value == getattr(layer, "alpha", None):
                return layer
            if isinstance(layer, LowRank):
                return replace(layer, alpha=value)
        return self._build(record, lambda tensor: tensor, value)

    def _whole(self, stem: str) -> Layer:
        record = self.records[stem]
        return self._named(record, lambda record: self._build(record, _values, self._alphas[stem]))

    def _build(self, record: Record, read: Callable[[Tensor], Any], alpha: float | None) -> Layer:
        held = {role: read(self.tensors[key]) for role, key in record.keys.items() if role not in ("alpha", "scale")}
        return build(held, alpha, self.weight(record))

    def _named(self, record: Record, make: Callable[[Record], Layer]) -> Layer:
        try:
            return make(record)
        except LoRAMergeError as error:
            raise type(error)(f"{self.name}: {record.stem}: {error}") from None

    def weight(self, record: Record) -> Shape | None:
        """Shape of the weight that the record updates, where the architecture knows it."""
        if self.architecture is None:
            return None
        if len(record.parts) == 1:
            return self.architecture.shapes.get(record.parts[0].module)
        shapes = [self.architecture.shapes.get(part.module) for part in record.parts]
        known = [shape for shape in shapes if shape is not None]
        return (sum(s[0] for s in known), *known[0][1:]) if len(known) == len(shapes) else None

    def configured(self, record: Record) -> float | None:
        """The alpha that a configuration beside the tensors gives."""
        component, _, path = record.parts[0].module.partition(".")
        config = self.config.get(component) or self.config.get("")
        return alphas.alpha(config, path, alphas.rank(record.keys, self.tensors)) if config else None


def _values(tensor: Tensor) -> Array:
    array = tensor.read()
    check_finite(array)
    return array
