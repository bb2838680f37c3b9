"""Building the layers of one file from its records, each when it is asked for."""

import re
from collections.abc import Callable, Mapping
from copy import copy
from functools import cached_property
from typing import Any

from ..errors import LayerError, LoRAMergeError, NumberError
from ..layers import Layer, LowRank, build
from ..layers.base import scaled
from ..tensors import Array, Shape, Spec, Tensor, check_finite
from .dialects import alphas, fields
from .dialects.fields import Config
from .dialects.read import Reading
from .dialects.records import Record


class LayerBuilder:
    """Builds layers from the records of one file.

    Args:
        name: The name in messages.
        reading: The records.
        tensors: The file's tensors by key.
        config: PEFT's configurations by component.
        configured_as: If keys were renamed since the configurations were made: the builder of the layers that they are
            about, and its keys by new key.
    """

    def __init__(
        self,
        name: str,
        reading: Reading,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Config],
        configured_as: "tuple[LayerBuilder, Mapping[str, str]] | None" = None,
    ) -> None:
        self.name = name
        self.records = reading.records
        self.tensors = tensors
        self.config = config
        self.configured_as = configured_as
        self.architecture = reading.architecture
        self.parts = {part.module: (part, record) for record in reading.records.values() for part in record.parts}
        self.source = object()
        self._recent: dict[str, Layer] = {}
        self._layouts: dict[str, Layer] = {}
        self._alphas: dict[str, float | None] = {}
        self._configured: dict[tuple[int, int, frozenset[str]], float] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> "LayerBuilder":
        """Return a builder for the same records, from other tensors with the same keys."""
        found = copy(self)
        found.tensors, found._recent = tensors, {}
        return found

    def whole(self, stem: str) -> Layer:
        """Return the layer of a stem; a fused one is asked for once per part, so the last few are kept."""
        if len(self.records[stem].parts) == 1:
            return self._whole(stem)
        found = self._recent.get(stem) or self._whole(stem)
        self._recent = {**dict(list(self._recent.items())[-3:]), stem: found}
        return found

    def layer(self, module: str) -> Layer:
        """Build the layer of a module."""
        return self.part(module, self.whole(self.parts[module][1].stem))

    def part(self, module: str, whole: Layer) -> Layer:
        """Return a module's part of the layer of its stem: the layer itself, or some of its rows."""
        part, record = self.parts[module]
        return whole if part.rows is None else whole.rows(part.rows, (self.source, record.stem))

    def layout(self, record: Record) -> Layer:
        """Return the layer of a record without values."""
        found = self._layouts.get(record.stem)
        if found is None:
            try:
                found = self._layouts[record.stem] = self._layout(record)
            except LoRAMergeError as error:
                raise error.at(f"{self.name}: {record.stem}") from None
        return found

    def _layout(self, record: Record) -> Layer:
        layer, weight = record.layer, self.weight(record)
        value = self.configured(record) if record.alpha is None else record.alpha
        self._alphas[record.stem] = value
        if layer is not None and layer.shape == weight and "reshape_weight" not in record.keys:
            if value == getattr(layer, "alpha", None):
                return self._as_trained(record, layer)
            if isinstance(layer, LowRank):
                return self._as_trained(record, _changed(layer, {"alpha": value}))
        return self._build(record, lambda tensor: tensor, value)

    def _as_trained(self, record: Record, layer: Layer) -> Layer:
        config = self.config_of(record)
        return fields.as_trained(layer, config) if config else layer

    def _whole(self, stem: str) -> Layer:
        record = self.records[stem]
        try:
            return self._filled(record) or self._build(record, _values, self._alphas[stem])
        except NumberError as error:
            modules = [part.module for part in record.parts]
            excluded = " ".join(f"--exclude '{module}'" for module in modules)
            way = f"Way out: leave {'it' if len(modules) == 1 else 'all of them'} out (exclude), such as {excluded}"
            raise NumberError(f"{error}. {way}").at(f"{self.name}: {', '.join(modules)}") from None
        except LoRAMergeError as error:
            raise error.at(f"{self.name}: {stem}") from None

    def _filled(self, record: Record) -> Layer | None:
        """Return a LoRA's layout with values in the place of the file's tensors; None unless it holds these very tensors."""
        layout = self._layouts[record.stem]
        if not isinstance(layout, LowRank):
            return None
        held = layout.tensors()
        if any(type(tensor) is Spec for tensor in held.values()):  # reshaped, or folded of several
            return None
        values = {role: _values(self.tensors[key]) for role, key in record.keys.items() if role in held}
        return _changed(layout, values)

    def _build(self, record: Record, read: Callable[[Tensor], Any], alpha: float | None) -> Layer:
        apart = {"alpha", "scale", *["reshape_weight"] * self.widened(record)}
        held = {role: read(self.tensors[key]) for role, key in record.keys.items() if role not in apart}
        if held.keys() >= fields.WHOLE and record.alpha is None and alpha is not None:
            held["lokr_w1"] = held["lokr_w1"] if alpha == 1 else scaled(held["lokr_w1"], alpha)
            alpha = None  # LyCORIS has no scale there
        return self._as_trained(record, build(held, alpha, self.weight(record)))

    def weight(self, record: Record) -> Shape | None:
        """Return the shape of the weight that the record updates; None if the architecture doesn't know it."""
        if self.architecture is None:
            return None
        if len(record.parts) == 1:
            sizes = self.architecture.sizes(record.parts[0].module)
            own = record.layer.shape if record.layer is not None and len(sizes) > 1 else ()
            return own if own in sizes else next(iter(sizes), None)
        shapes = [self.architecture.shapes.get(part.module) for part in record.parts]
        known = [shape for shape in shapes if shape is not None]
        return (sum(s[0] for s in known), *known[0][1:]) if len(known) == len(shapes) else None

    @cached_property
    def owners(self) -> Mapping[str, Record]:
        """The record that holds each tensor, by key."""
        return {key: record for record in self.records.values() for key in record.keys.values()}

    def config_of(self, record: Record) -> Config | None:
        """Return PEFT's configuration of the component that a record belongs to."""
        if not self.config:
            return None
        folder, slash, _ = record.stem.partition("/")
        component = folder if slash else record.parts[0].module.partition(".")[0]
        return self.config.get(component) or self.config.get("")

    def widened(self, record: Record) -> bool:
        """Return whether ``reshape_weight`` only repeats the layer's own shape, which is wider than the weight's."""
        key = record.keys.get("reshape_weight")
        if key is None or record.layer is None or self.weight(record) is None:
            return False
        return tuple(self.tensors[key].read().tolist()) == record.layer.shape

    def configured(self, record: Record) -> float | None:
        """Return the alpha that PEFT's configuration gives; None if there is no configuration or nothing to scale."""
        if self.configured_as is not None:
            before, keys = self.configured_as
            return before.configured(before.owners[keys[next(iter(record.keys.values()))]])
        config, roles = self.config_of(record), record.keys.keys()
        if config is None or not roles & fields.SCALED:
            return None
        rank = alphas.rank(record.keys, self.tensors)
        if fields.is_uniform(config):
            like = (id(config), rank, frozenset(roles))
            if like not in self._configured:
                self._configured[like] = fields.alpha(config, names_of(record)[0], rank, roles)
            return self._configured[like]
        found = {fields.alpha(config, names, rank, roles) for names in names_of(record)}
        if len(found) > 1:
            raise LayerError(f"the configuration gives the parts of this weight the alphas {sorted(found)}")
        return found.pop()


def _changed(layer: LowRank, fields: Mapping[str, Any]) -> LowRank:
    """Return a layer with other values of some fields: `dataclasses.replace` without the checks, which the layer has passed."""
    made = object.__new__(LowRank)
    made.__dict__.update(layer.__dict__, **fields)
    return made


PREFIX = re.compile(r".*base_model\.model\.|(?:unet|transformer|text_encoder(?:_\d)?|diffusion_model)\.")
"""Prefixes of a module's own path in a stem."""


def names_of(record: Record) -> list[list[str]]:
    """Return the names by which a configuration's patterns may refer to each of a record's modules, the best first.

    The best is the name in the model that PEFT wrapped.  If the file was renamed since, that name is lost,
    and diffusers' own is tried too.
    """
    own = PREFIX.sub("", record.stem, count=1)
    if "base_model.model." in record.stem:
        return [[own]]
    return [[own, part.module.partition(".")[2]] for part in record.parts]


def _values(tensor: Tensor) -> Array:
    array = tensor.read()
    check_finite(array)
    return array
