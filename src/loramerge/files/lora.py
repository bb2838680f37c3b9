"""A LoRA: an ordered mapping of a model's modules to layers, whichever tool named the file's keys."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..devices import to_torch
from ..errors import LoRAMergeError, OptionError, check_callable, computing, span, within
from ..layers import Layer
from ..tensors import Held, Shape, Tensor, check_finite, is_torch, nbytes
from .architectures.blocks import Selector, offered
from .building import LayerBuilder
from .dialects import adapters, alphas, fields
from .dialects.fields import Config
from .dialects.read import Reading, read
from .metadata import of_changed
from .storage.header import Awaited
from .storage.paths import printable
from .storage.reader import SafetensorsFile

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from .storage.writer import Progress


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """The tensors that a LoRA was read from, under their own keys."""

    tensors: Mapping[str, Tensor]
    dialect: str
    config: Mapping[str, Config] = field(default_factory=dict)
    """PEFT's configuration, by component (``""`` for the directory's own)."""
    scales_beside: bool = False
    """True if a scale isn't among the tensors but in the header or the configuration."""
    layouts: Mapping[str, Layer] = field(default_factory=dict)
    """The layouts as read; a LoRA whose layouts are others was changed."""
    source: str | None = None
    """The file's or directory's name, or ``hf://org/repo@revision``; None for a state dict."""
    forced: Mapping[str, str] = field(default_factory=dict)
    """The architecture, the dialect and the adapter, where the caller named them."""
    builder: LayerBuilder | None = None
    """Builds the layers from the tensors; None once they are built."""

    def held(self) -> "Origin":
        """Return the same origin with every tensor in memory."""
        tensors = {key: Held(tensor.read()) for key, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, builder=self.builder and self.builder.of(tensors))


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
    alike: tuple[str, ...] = ()
    """Other families whose layers have the same names and shapes; only what the file says could tell them apart."""
    style: str = ""
    """Its file's spelling of LoRA's own tensors, see `dialects.suffixes`; empty for a LoRA made in memory."""
    layouts: Mapping[str, Layer]
    """Every module's layer, of which the tensors may be stand-ins with shapes only."""
    compute: Callable[[str], Layer] | None = None
    """Loads or computes one module's layer; None if `layouts` already hold the values."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that belong to no layer: embeddings, strays.  Kept, never merged into a weight."""
    about: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """PEFT's configuration fields about the base model, by component (``""`` for any)."""
    notes: tuple[str, ...] = ()
    """Sentences on repairs and on anything unusual."""
    dtype: str | None = None
    """Default dtype for saving; None keeps every tensor's own."""
    source_bytes: int | None = None
    """Bytes of the tensors that it was made of; None if there is nothing to compare its size with."""
    no_fork: bool = False
    """True if `compute` has side effects in this process, so saving must not use forked workers."""
    origin: Origin | None = field(default=None, repr=False)
    files: tuple[SafetensorsFile, ...] = ()
    """The open files that layers are read from; a part of a LoRA has those of the whole."""

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
            f"LoRA({self.name!r}, {' or '.join(self.families) or 'unknown architecture'}, {self.dialect}, "
            f"{len(self)} modules, {self.summary('rank')})"
        )

    def __enter__(self) -> "LoRA":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that layers are read from, if any are open; for the whole LoRA if this is a part of it."""
        for file in self.files:
            file.close()

    @property
    def paths(self) -> "list[str | PathLike[str]]":
        """Paths of the open files that layers are read from."""
        return [file.path for file in self.files]

    @property
    def families(self) -> tuple[str, ...]:
        """Every model family that the LoRA may be for, the likeliest first; empty if it is unknown."""
        return (self.architecture, *self.alike) if self.architecture else ()

    def layout(self, module: str) -> Layer:
        """Return the module's layer without its values: kind, shape, rank, alpha."""
        return self.layouts[module]

    def summary(self, what: str) -> str:
        """Return the range of a layout's attribute over all modules: ``"rank 4 to 16"``."""
        values = {v for layer in self.layouts.values() if (v := getattr(layer, what, None)) is not None}
        if not values:
            return f"no {what}"
        return f"{what} {span(min(values), max(values))}"

    def norm(self) -> float:
        """Return the Frobenius norm of the whole update, over all modules."""
        squares = 0.0
        for module in self:
            with computing(module):
                squares += checked(self, module).norm() ** 2
        return math.sqrt(squares)

    def select(self, *patterns: str) -> "LoRA":
        """Return the part whose modules match one of the patterns, as in weights: ``"unet.*attn2*"``, ``"OUT03"``."""
        others = set(self.others(*patterns))
        if len(others) == len(self):
            raise OptionError(f"No module of {self.name} matches {' or '.join(patterns)}. {_offered(self)}")
        return self.part([m for m in self if m not in others])

    def exclude(self, *patterns: str) -> "LoRA":
        """Return the LoRA without the modules that match one of the patterns."""
        kept = self._without(patterns)
        if patterns and kept is self:
            raise OptionError(f"No module of {self.name} matches {' or '.join(patterns)}. {_offered(self)}")
        if not kept:
            raise OptionError(f"No module of {self.name} is left: every one matches {' or '.join(patterns)}.")
        return kept

    def others(self, *patterns: str) -> list[str]:
        """Return the modules that match none of the patterns."""
        selector = Selector(patterns, self.architecture)
        return [m for m in self if not selector.matching(m)]

    def part(self, modules: Iterable[str]) -> "LoRA":
        """Return the LoRA with some of its modules only; there may be none."""
        layouts = {m: self.layouts[m] for m in modules}
        if len(layouts) == len(self):
            return self
        metadata = of_changed(self.metadata)
        return replace(self, layouts=layouts, metadata=metadata, origin=None, compute=self.__getitem__)

    def shaped(self, weights: Mapping[str, Shape]) -> "LoRA":
        """Return the LoRA with its layers in the weights' shapes, where the file flattened a kernel.

        Args:
            weights: The weights' shapes by module.
        """
        return self._formed(lambda module, layer: layer.shaped(weights[module]))

    def widened(self, weights: Mapping[str, Shape]) -> "LoRA":
        """Return the LoRA with some layers for weights with more inputs, on which the further ones have no effect.

        Args:
            weights: The weights' shapes by module.
        """
        return self._formed(lambda module, layer: layer.widened(weights[module]) if module in weights else layer)

    def _formed(self, form: Callable[[str, Layer], Layer]) -> "LoRA":
        changed = {m: made for m, layout in self.layouts.items() if (made := form(m, layout)) is not layout}
        if not changed:
            return self
        return replace(self, layouts={**self.layouts, **changed}, origin=None, compute=lambda m: form(m, self[m]))

    def renamed(self, names: Mapping[str, str]) -> "LoRA":
        """Return the LoRA with other names for some of its modules.

        Args:
            names: New names by old.
        """
        if all(new == old for old, new in names.items()):
            return self
        olds = {names.get(module, module): module for module in self}
        layouts = {new: self.layouts[old] for new, old in olds.items()}
        return replace(self, layouts=layouts, origin=None, compute=lambda module: self[olds[module]])

    def _without(self, patterns: Sequence[str]) -> "LoRA":
        """Return the LoRA without the modules and the extras that match one of the patterns."""
        kept = self.part(self.others(*patterns))
        selector = Selector(patterns)
        extras = {key: t for key, t in self.extras.items() if not selector.matching(key)}
        if len(extras) == len(self.extras):
            return kept
        return replace(kept, extras=extras, metadata=of_changed(self.metadata), origin=None)

    @property
    def as_read(self) -> bool:
        """True if this is what was read, unchanged."""
        return self.origin is not None and self.origin.layouts is self.layouts

    @cached_property
    def sha256(self) -> str:
        """Content hash: SHA-256 of a safetensors file holding only these tensors, without metadata.

        A file's tensors have their own keys; those of a LoRA that was changed or made in memory are
        called ``module.role``.  Scales that are not among the tensors are hashed too, as the metadata
        entry ``alphas``.  Reads every tensor.
        """
        from .storage.writer import sha256

        if self.origin and self.as_read:
            return sha256(self.origin.tensors, _alphas(self.layouts) if self.origin.scales_beside else {})
        layers = dict(self.items())
        held = {f"{m}.{role}": Held(array) for m, layer in layers.items() for role, array in layer.tensors().items()}
        return sha256({**held, **self.extras}, _alphas(layers))

    def in_memory(self, progress: "Progress | None" = None) -> "LoRA":
        """Return the same LoRA with every layer computed and every tensor read.

        Args:
            progress: Called with the number of modules done and of all.
        """
        check_callable(progress=progress)
        if isinstance(self.metadata, Awaited):
            self.metadata.begin()
        origin = self.origin.held() if self.origin and self.as_read else None
        # The layers share the origin's tensors, which are kept so that saving can copy the file byte for byte.
        compute = origin.builder.layer if origin and origin.builder else self.__getitem__
        layouts: dict[str, Layer] = {}
        for done, module in enumerate(self, start=1):
            layouts[module] = compute(module)
            if progress:
                progress(done, len(self))
        tensors = origin.tensors if origin else self.extras
        return replace(
            self,
            layouts=layouts,
            compute=None,
            metadata=dict(self.metadata),
            extras={key: Held(tensors[key].read()) for key in self.extras},
            origin=replace(origin, layouts=layouts, builder=None) if origin else None,
            files=(),
        )

    def state_dict(self, dialect: str | None = None, dtype: str | None = None) -> dict[str, "torch.Tensor"]:
        """Return the LoRA's tensors under a dialect's keys, as torch tensors.

        Args:
            dialect: Name of a dialect that can be written; the LoRA's own by default.
            dtype: ``"float32"``, ``"float16"`` …; every tensor's own by default.

        Returns:
            Copies, so that a reader may change them: diffusers scales some in place.

        Raises:
            DialectError: The dialect can't hold a layer.
        """
        from .dialects.write import state_dict

        return {
            key: array.clone() if is_torch(array) else to_torch(array.copy())
            for key, array in state_dict(self, dialect, dtype).items()
        }


def without(loras: Sequence[LoRA], patterns: Sequence[str]) -> list[LoRA]:
    """Return the LoRAs without the modules that match one of the patterns, as in weights.

    Raises:
        OptionError: There are patterns, and no module of any LoRA matches.
    """
    kept = [lora._without(patterns) for lora in loras]
    if patterns and all(a is b for a, b in zip(kept, loras, strict=True)):
        raise OptionError(f"No module matches the pattern {' or '.join(patterns)}. {_offered(*loras)}")
    return kept


def agreed(loras: Sequence[LoRA]) -> dict[str, dict[str, str]]:
    """Return the fields about the base model on which the configurations of all LoRAs agree, by component."""
    if not all(lora.about for lora in loras):
        return {}
    having: dict[str, list[LoRA]] = {}
    for lora in loras:
        for component in dict.fromkeys(module.partition(".")[0] for module in lora):
            having.setdefault(component, []).append(lora)
    return {component: _alike(component, those) for component, those in having.items()}


def _alike(component: str, loras: Sequence[LoRA]) -> dict[str, str]:
    first, *others = [lora.about.get(component) or lora.about.get("", {}) for lora in loras]
    return {field: value for field, value in first.items() if all(other.get(field) == value for other in others)}


def _offered(*loras: LoRA) -> str:
    return offered((module for lora in loras for module in lora), loras[0].architecture if loras else None)


def _alphas(layers: Mapping[str, Layer]) -> dict[str, str]:
    found = {module: layer.own_alpha for module, layer in layers.items()}
    return {"alphas": json.dumps({module: None if alpha is None else float(alpha) for module, alpha in found.items()})}


def checked(lora: LoRA, module: str) -> Layer:
    """Return a module's layer without NaN and infinity: those of an open file were refused when it was read.

    Raises:
        NumberError: A value is not finite.
    """
    layer = lora[module]
    if not lora.files:
        with within(f"{lora.name}: {module}"):
            for tensor in layer.tensors().values():
                check_finite(tensor)
    return layer


def from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    name: str,
    *,
    config: Mapping[str, Config] | None = None,
    configured_as: tuple[LayerBuilder, Mapping[str, str]] | None = None,
    architecture: str | None = None,
    dialect: str | None = None,
    adapter: str | None = None,
    notes: Sequence[str] = (),
    files: Sequence[SafetensorsFile] = (),
    source: str | None = None,
) -> LoRA:
    """Recognise tensors under the keys of any dialect as a LoRA.

    Args:
        tensors: Stored or held tensors by key.
        metadata: The file's metadata.
        name: The name in messages: the file's.
        config: PEFT's ``adapter_config.json``, by component.
        configured_as: The layers to which the configuration gives their scales, if the keys were renamed: what builds
            them, and their keys by new key.
        architecture: Name of the family, where the keys leave it open.
        dialect: Name of the dialect, where the keys leave it open.
        adapter: Which of several adapters in the keys.
        notes: Sentences on anything unusual about the file.
        files: The open files that stored tensors are read from, which the LoRA's `close` closes.
        source: The source that a merge's recipe names (`Origin.source`).

    Raises:
        NotALoRAError: No layer is among the keys, or several adapters are.
        LayerError: A layer is incomplete, or its tensors disagree.
    """
    name = printable(name)
    try:
        tensors = adapters.one(tensors, adapter)
        scales = alphas.configs(metadata, config or {})
        reading = read(_whole(tensors, scales), metadata, architecture=architecture, dialect=dialect)
    except LoRAMergeError as error:
        raise type(error)(f"{name}: {error}") from None
    builder = LayerBuilder(name, reading, tensors, scales, configured_as)
    said = [*notes, *reading.notes, *_notes(tensors, reading, scales)]
    order = list(reading.architecture.shapes) if reading.architecture else []
    modules = dict.fromkeys([*(m for m in order if m in builder.parts), *builder.parts])
    layouts = {m: builder.part(m, builder.layout(builder.parts[m][1])) for m in modules}
    forced = {"architecture": architecture, "dialect": dialect, "adapter": adapter}
    beside = any(r.alpha is None and builder.configured(r) is not None for r in reading.records.values())
    return LoRA(
        name=name,
        architecture=reading.architecture.name if reading.architecture else None,
        dialect=reading.dialect.name,
        alike=reading.alike,
        style=reading.style,
        layouts=layouts,
        compute=builder.layer,
        metadata=dict(metadata),
        extras={key: tensors[key] for key in reading.extras},
        about={component: fields.about(config) for component, config in scales.items()},
        notes=tuple(said),
        source_bytes=sum(nbytes(tuple(tensor.shape), tensor.dtype) for tensor in tensors.values()),
        origin=Origin(
            tensors=tensors,
            dialect=reading.dialect.name,
            config=dict(config or {}),
            scales_beside=beside,
            layouts=layouts,
            source=source,
            forced={key: value for key, value in forced.items() if value is not None},
            builder=builder,
        ),
        files=tuple(files),
    )


def _whole(tensors: Mapping[str, Tensor], configs: Mapping[str, Config]) -> Mapping[str, Tensor]:
    """Return the tensors without those that AdaLoRA cut down to rank 0: their ΔW is zero."""
    if all(config["peft_type"] != "ADALORA" for config in configs.values()):
        return tensors
    return {key: tensor for key, tensor in tensors.items() if 0 not in tensor.shape}


def _notes(tensors: Mapping[str, Tensor], reading: Reading, configs: Mapping[str, Config]) -> Iterator[str]:
    """Yield a note on everything in PEFT's configurations that the layers don't show."""
    if not configs and any("base_model.model." in key for key in tensors):
        yield (
            "PEFT's adapter_config.json is missing, so the strength is a guess (alpha = rank, scale 1): "
            "put the one of the same download beside the file, or name the folder of both"
        )
    apart = "are no part of the LoRA, are kept as they are, and are in no merge or sum"
    saved = [each["modules_to_save"] for each in configs.values() if isinstance(each.get("modules_to_save"), list)]
    if modules := dict.fromkeys(str(part) for parts in saved for part in parts):
        yield f"trained with PEFT's modules_to_save: the whole weights of {', '.join(modules)} {apart}"
    if tokens := sum("trainable_tokens" in key for key in reading.extras):
        yield f"trained with PEFT's trainable_token_indices: {tokens} tensors of single tokens {apart}"
    biased = any(config.get("bias", "none") != "none" for config in configs.values())
    whole = [key for key in reading.extras if ".base_layer." in key or (biased and key.endswith(".bias"))]
    if whole:
        yield f"it holds {len(whole)} of the trained model's own biases or weights ({whole[0]} …): they {apart}"
    began = sorted({start for config in configs.values() if (start := fields.start(config))})
    if began:
        yield f"its factors began as a part of the base weights (init_lora_weights: {', '.join(began)}), so it is no plain LoRA"
    if strange := dict.fromkeys(field for config in configs.values() for field in fields.strange(config)):
        yield f"its configuration has fields that loramerge doesn't know and takes for harmless: {', '.join(strange)}"
