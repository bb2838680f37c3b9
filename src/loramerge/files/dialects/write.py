"""Writing a LoRA under a dialect's names, every layer in a form that the dialect's readers get right."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, TypeAlias

from ... import linalg
from ...errors import DialectError, FamilyError, LayerError, LoRAMergeError, NumberError, an
from ...layers import Layer, LowRank, Rows, low_rank
from ...layers.base import matrix
from ...tensors import (
    FLOATS,
    Array,
    Held,
    Spec,
    Tensor,
    cast,
    check_finite,
    code,
    float32,
    is_torch,
    reshape,
    written_dtype,
)
from ..architectures import ARCHITECTURES, Architecture, name_family, titles
from ..architectures.names import Part, Parts, whole
from . import DIALECTS, fuse, written_dialect
from .base import LOW_RANK, Dialect, table
from .free import DENOISERS
from .repairs import repaired
from .suffixes import spelled

if TYPE_CHECKING:
    from ..lora import LoRA


@dataclass(frozen=True)
class Group:
    """Tensors that are written together: their keys and shapes, and a function that makes their values."""

    name: str
    specs: Mapping[str, Spec]
    make: Callable[[], Mapping[str, Array]]
    check_finite_values: bool = True
    """False if NaN and infinity are allowed: in an alpha that scales nothing."""

    def arrays(self) -> dict[str, Array]:
        """Make the values, in the dtypes of `specs`.

        Raises:
            NumberError: A value is NaN, infinite or too large for the dtype.
        """
        try:
            made = self.make()
            shapes = {key: tuple(array.shape) for key, array in made.items()}
            if shapes != {key: tuple(spec.shape) for key, spec in self.specs.items()}:
                raise LayerError(f"{self.name}: made {shapes}, planned {dict(self.specs)}; nothing is written")
            checked = _finite if self.check_finite_values else cast
            return {key: checked(array, self.specs[key].dtype) for key, array in made.items()}
        except NumberError as error:
            raise error.at(self.name) from None


def _finite(array: Array, dtype: str) -> Array:
    """Cast, rejecting NaN and infinity; a narrowing cast already checks every value."""
    if code(array) == dtype or dtype in ("F32", "F64"):
        check_finite(array)
    return cast(array, dtype)


def _check_magnitudes(lora: "LoRA", layers: Mapping[str, Layer]) -> None:
    """Refuse a model with DoRA layers and also LoRA layers or biases: PEFT gives every layer a magnitude, and then no bias.

    Raises:
        DialectError: A model has both.
    """
    plain = {_component(module): module for module, layer in layers.items() if layer.kind == "lora"}
    biased = {_component(module): module for module, layer in layers.items() if layer.delta_bias() is not None}
    for module, layer in layers.items():
        if layer.axis is None:
            continue
        if other := plain.get(_component(module)):
            raise DialectError(
                f"{lora.name}: {module} is a DoRA layer and {other} is not, and PEFT and diffusers read the layers of a model "
                "as the one or the other. Ways out: another dialect, such as kohya or comfyui, or leave the one or the "
                "other out (exclude)."
            )
        if other := biased.get(_component(module)):
            raise DialectError(
                f"{lora.name}: {module} is a DoRA layer and {other} changes a bias, and PEFT and diffusers read no bias of a "
                "model with DoRA layers. Ways out: another dialect, such as kohya or comfyui, or leave the one or the other "
                "out (exclude)."
            )


@dataclass(frozen=True)
class Spelling:
    """A LoRA under a dialect's names."""

    dialect: Dialect
    groups: list[Group]
    verbatim: bool
    """True if these are the very tensors that were read."""
    dtype: str | None = None
    """The dtype that was asked for."""
    layers: Mapping[str, Layer] = field(default_factory=dict)
    """Layouts as written, by module, for PEFT's configuration; empty when verbatim."""
    left_out: tuple[str, ...] = ()
    """The layers and tensors that ``allow_lossy`` dropped, and why."""


def state_dict(lora: "LoRA", dialect: str | None, dtype: str | None) -> dict[str, Array]:
    """Return a LoRA's arrays by key, for use without a header or a configuration."""
    spelling = spell(lora, dialect, dtype, alone=True)
    return {key: array for group in spelling.groups for key, array in group.arrays().items()}


def spell(
    lora: "LoRA",
    dialect: str | None = None,
    dtype: str | None = None,
    *,
    allow_lossy: bool = False,
    alone: bool = False,
) -> Spelling:
    """Plan the names and shapes of a LoRA in a dialect; values are made later, group by group.

    A LoRA that goes back to the dialect it was read in keeps its tensors as they are.

    Args:
        lora: The LoRA to write.
        dialect: Name of the dialect; the LoRA's own by default.
        dtype: Dtype of the tensors; their own by default.
        allow_lossy: True to leave out what the dialect can't hold.
        alone: True if the tensors go without a header or a configuration: as a state dict.

    Raises:
        DialectError: The dialect is read-only, or can't hold a layer.
    """
    target = written_dialect(dialect or lora.dialect)
    wanted = written_dtype(dtype) if dtype else lora.dtype
    if _can_be_verbatim(lora, target, alone):
        return Spelling(target, _verbatim(lora, wanted), verbatim=True, dtype=wanted)
    check_writable(target.name, lora.dialect)
    writer = _Writer(lora, target, wanted, allow_lossy)
    groups = list(writer.groups())
    if not writer.layers:
        raise DialectError(f"{lora.name}: nothing is left that {target.name} can hold: {'; '.join(writer.left_out)}.")
    if target.style == "peft":
        _check_magnitudes(lora, writer.layers)
    return Spelling(target, groups, False, wanted, writer.layers, tuple(writer.left_out))


def _can_be_verbatim(lora: "LoRA", target: Dialect, alone: bool) -> bool:
    """Return whether the tensors, written as they were read, will be read as the same LoRA.

    They won't if the LoRA was changed, or if its scales are outside of the tensors and get lost:
    a state dict has no header, and only PEFT's directory has a configuration.
    """
    origin = lora.origin
    if origin is None or origin.dialect != target.name or lora.layouts is not origin.layouts:
        return False
    if target.name == "peft" and not alone:
        return bool(origin.config)
    return not origin.scales_beside or (not alone and not origin.config)


def _verbatim(lora: "LoRA", dtype: str | None) -> list[Group]:
    assert lora.origin
    return [
        Group(key, {key: _cast_spec(tensor, dtype)}, partial(_as_read, key, tensor), not _is_read_alpha(key, tensor))
        for key, tensor in lora.origin.tensors.items()
    ]


def _is_read_alpha(key: str, tensor: Tensor) -> bool:
    """Return whether a tensor is an alpha: reading checked those that scale something."""
    return key.endswith(".alpha") and math.prod(tensor.shape) == 1


def check_writable(name: str, own: str) -> None:
    """Refuse a dialect that is only read, unless it `rewrites` LoRAs that were read in it.

    Raises:
        DialectError: The dialect is only read.
    """
    target = written_dialect(name)
    if not target.can_write(own):
        writable = ", ".join(d.name for d in DIALECTS.values() if d.writes)
        raise DialectError(f"The dialect {target.name} is read, not written. Written are: {writable}.")


def _as_read(key: str, tensor: Tensor) -> dict[str, Array]:
    return {key: tensor.read()}


def _cast_spec(spec: Spec, dtype: str | None) -> Spec:
    """Return a tensor's spec in the dtype asked for; scalars such as alpha and integers keep theirs."""
    keeps = dtype is None or spec.dtype not in FLOATS or not spec.shape
    return Spec(tuple(spec.shape), spec.dtype if keeps or dtype is None else dtype)


def holds(dialect: Dialect, layout: Layer) -> bool:
    """Return whether a dialect can hold a layer, maybe as the LoRA with the same ΔW."""
    if layout.delta_bias() is not None and dialect.holds == LOW_RANK:
        return False
    return layout.kind in dialect.holds or layout.factored


Homes: TypeAlias = Mapping[str, tuple[str, Parts]]
"""The stem in which a dialect writes each module, and all modules of that stem."""


@cache
def _homes(dialect: Dialect, a: Architecture | None) -> Homes:
    named = table(dialect.names, a) if a else {}
    return {part.module: (stem, parts) for stem, parts in named.items() for part in parts}


class _Writer:
    def __init__(self, lora: "LoRA", dialect: Dialect, dtype: str | None, allow_lossy: bool) -> None:
        self.lora = lora
        self.dialect = dialect
        self.dtype = dtype
        self.allow_lossy = allow_lossy
        self.architecture: Architecture | None = ARCHITECTURES[lora.architecture] if lora.architecture else None
        self.style = dialect.written_style(self.architecture, lora.style if lora.dialect == dialect.name else "")
        self.constant = _constant_alpha(lora.layouts.values()) if dialect.alpha == "constant" else None
        self.biased = {_component(module) for module, lay in lora.layouts.items() if lay.delta_bias() is not None}
        self.layers: dict[str, Layer] = {}
        self.left_out: list[str] = []

    def groups(self) -> Iterator[Group]:
        stems = self.stems()
        for stem, parts in stems.items():
            try:
                layout = self.layer(parts, self.lora.layout)
                if self.needs_values(layout):
                    layout = self.layer(parts, self.lora.__getitem__)
            except LoRAMergeError as error:
                if not self.allow_lossy:
                    raise DialectError(f"{self.lora.name}: {error}{self.others()}") from None
                self.left_out.append(str(error))
                continue
            known = all(isinstance(t, Spec) for t in layout.tensors().values())
            self.layers[parts[0].module] = layout if known else layout.map(_shape_only)
            specs = {key: self.spec(key, tensor) for key, tensor in self.tensors(stem, parts, layout).items()}
            yield Group(stem, specs, partial(self.values, stem, parts))
        for key, tensor in self.extras(stems).items():
            yield Group(key, {key: _cast_spec(tensor, None)}, partial(_as_read, key, tensor))

    def others(self) -> str:
        """Count the layers that the dialect can't hold, and name dialects that hold all; empty if it is only one."""
        layouts = self.lora.layouts.values()
        refused = sum(not holds(self.dialect, layout) for layout in layouts)
        if refused < 2:
            return ""
        written = [d for d in DIALECTS.values() if d.writes and _homes(d, self.architecture).keys() >= self.lora.keys()]
        wide = [d.name for d in written if all(holds(d, layout) for layout in layouts)]
        ways = [f"a dialect that holds all of them ({', '.join(wide)})"] * bool(wide) + ["leave them out (allow_lossy)"]
        return f". It is one of {refused} layers that {self.dialect.name} can't hold: {', or '.join(ways)}."

    def extras(self, stems: Collection[str]) -> Mapping[str, Tensor]:
        """Return embeddings and strays, unless the dialect's readers would fail on them, or take them for a layer's."""
        for key in self.lora.extras if self.dialect.name != self.lora.dialect else ():
            stem = next((key[:i] for i, letter in enumerate(key) if letter == "." and key[:i] in stems), None)
            if stem is not None:
                raise DialectError(
                    f"{self.lora.name}: the tensor {key} belongs to no layer, and {self.dialect.name} would have it beside "
                    f"the tensors of the layer {stem}. Ways out: another dialect, or leave it out (exclude)."
                )
        if self.dialect.alpha != "bake" or not self.lora.extras:
            return self.lora.extras
        names = ", ".join(self.lora.extras)
        if not self.allow_lossy:
            raise DialectError(
                f"{self.lora.name}: {self.dialect.name} can't hold the tensors that belong to no layer: {names}. "
                "Way out: leave them out (allow_lossy)."
            )
        self.left_out.append(f"tensors that belong to no layer: {names}")
        return {}

    def stems(self) -> dict[str, Parts]:
        """Return the stems to write, each with its modules."""
        homes = _homes(self.dialect, self.architecture)
        # In its own dialect a file keeps the names that it has, whatever its family.
        for other in self.lora.alike if self.dialect.name != self.lora.dialect else ():
            self.check_alike(homes, _homes(self.dialect, ARCHITECTURES[other]), other)
        stems: dict[str, Parts] = {}
        for module in self.lora:
            stem, parts = homes.get(module) or self.free(module)
            if stems.setdefault(stem, parts) != parts:
                raise DialectError(
                    f"{self.lora.name}: {stems[stem][0].module} and {module} would both be called {stem} in "
                    f"{self.dialect.name}. Ways out: another dialect, or leave one out (exclude)."
                )
        return stems

    def check_alike(self, homes: Homes, others: Homes, other: str) -> None:
        """Refuse to choose between families whose names in the dialect differ.

        Raises:
            FamilyError: They differ for a module of the LoRA.
        """
        for module in self.lora:
            known = (
                module in others or module not in ARCHITECTURES[other].shapes
            )  # else the dialect has no name for it there
            if module in homes and known and homes[module] != others.get(module):
                theirs = others[module][0] if module in others else "otherwise"
                raise FamilyError(
                    f"{self.lora.name} may be for {titles(self.lora.families)}: its layers have the names and shapes of each, and "
                    f"{self.dialect.name} calls {module} {homes[module][0]} in the first and {theirs} in "
                    f"{other}. Way out: say which it is, --architecture {self.lora.architecture} or {other} "
                    "(in Python architecture=…)."
                )

    def free(self, module: str) -> tuple[str, Parts]:
        """Spell a module that no table lists.

        Raises:
            DialectError: The dialect has no name for it.
        """
        known = self.architecture is not None and module in self.architecture.shapes
        stem = None if known else self.dialect.free_stem(module, DIALECTS[self.lora.dialect])
        # A name that reads as a known mistake would come back as another module.
        if stem is None or (self.dialect.name != self.lora.dialect and repaired(stem)):
            raise DialectError(f"{self.lora.name}: {self.nameless(module)}")
        free = self.dialect.free
        if free and not free.says_component and self.has_two_denoisers:
            raise DialectError(
                f"{self.lora.name}: it has modules of a UNet and of a transformer, and names in {self.dialect.name} don't "
                f"say which of them {module} is of. Way out: leave those of one out (exclude)."
            )
        return stem, whole(module)

    @cached_property
    def has_two_denoisers(self) -> bool:
        """True if modules of a UNet and of a transformer are in the LoRA."""
        return {*DENOISERS} <= {module.partition(".")[0] for module in self.lora}

    def nameless(self, module: str) -> str:
        """Say why a module has no name in the dialect, and the ways out."""
        name, own = self.dialect.name, self.lora.dialect
        keep = f"keep the file's own dialect, {own}" if DIALECTS[own].can_write(own) else "another dialect"
        if self.architecture is None:
            return (
                f"its model family isn't known, so {name} has no name for the module {module}. "
                f"Ways out: {keep}, or {name_family()}."
            )
        if self.architecture.native is None:
            keep = "diffusers-peft, whose names the family has"
        what = "the module" if module in self.architecture.shapes else "a module that the family doesn't list,"
        return (
            f"{name} has no name for {what} {module} of {self.architecture.name}. "
            f"Ways out: {keep}, or leave the module out (exclude)."
        )

    def layer(self, parts: Parts, get: Callable[[str], Layer]) -> Layer:
        """Join the modules of a stem into one layer that the dialect's readers get right."""
        held = {part.module: self.held(part, get(part.module)) for part in parts if part.module in self.lora}
        fused = fuse.fused(parts, held, self.rows_in(held), lambda layer: _as_lora(layer, self.dialect))
        module = parts[0].module
        return self.with_bias(module, self.scaled(self.evened(module, self.checked(module, fused))))

    def with_bias(self, module: str, layer: Layer) -> Layer:
        """Give a layer a bias of zeros if another one of its model has a bias: diffusers leaves a missing one without values."""
        wanted = self.dialect.style == "peft" and _component(module) in self.biased and layer.delta_bias() is None
        return layer.with_inner(fuse.with_zero_bias) if wanted else layer

    def evened(self, module: str, layer: Layer) -> Layer:
        """Pad a layer to the rank that diffusers will give it: the commonest of its component."""
        if not module.endswith(self.dialect.even_rank):
            return layer
        component = _component(module)
        ranks = [lay.rank for m, lay in self.lora.layouts.items() if m.startswith(f"{component}.") and m != module]
        return layer.padded(Counter(ranks).most_common(1)[0][0] or 0) if ranks else layer

    def rows_in(self, held: Mapping[str, Layer]) -> Callable[[str], int]:
        """Return a function that gives the rows of a weight's module: its layer's, or in proportion to another layer's.

        In a model with widths of its own they aren't those of the family.
        """
        shapes = self.architecture.shapes if self.architecture else {}

        def rows_of(module: str) -> int:
            if module in held:
                return held[module].shape[0]
            other, layer = next(iter(held.items()))
            rows, rest = divmod(shapes[module][0] * layer.shape[0], shapes[other][0])
            if rest:
                raise LayerError(f"{module} is one weight with {other} here, and how many rows it has isn't known")
            return rows

        return rows_of

    def held(self, part: Part, layer: Layer) -> Layer:
        """Return a layer as the dialect can hold it: itself, or the LoRA with the same ΔW."""
        if layer.inner is not layer and layer.kind in self.dialect.holds:
            return layer.with_inner(partial(self.held, part))
        if (part.rows is None and isinstance(layer, Rows)) or layer.kind not in self.dialect.holds:
            layer = _as_lora(layer, self.dialect, part.module)
        if layer.has_core and not self.dialect.reads_core(layer.kind):
            layer = layer.without_core()
        if part.rows is None and isinstance(layer, LowRank):
            layer = fuse.compacted(layer)
        return layer

    def checked(self, module: str, layer: Layer) -> Layer:
        """Return the layer if the dialect's readers can take it.

        Raises:
            LayerError: They can't.
        """
        if self.dialect.dora_axis == "out" and layer.axis == "in":
            raise LayerError(f"{module}: {self.dialect.name} keeps DoRA norms of rows, this layer has norms of columns")
        if layer.delta_bias() is not None and self.dialect.holds == frozenset({"lora"}):
            raise LayerError(
                f"{module}: {self.dialect.name} can't hold the bias of this layer. Ways out: a dialect that holds it, such as kohya, comfyui or diffusers-peft, or leave the module out (exclude)"
            )
        if isinstance(layer.inner, Rows):
            raise LayerError(f"{module}: {an(layer.kind)} layer on a part of a fused weight can't be written alone")
        if layer.kind not in self.dialect.holds:
            raise LayerError(f"{module}: {layer.no_factors}")
        return layer

    def scaled(self, layer: Layer) -> Layer:
        """Return the same ΔW with the alpha that the dialect's readers expect."""
        return layer.with_inner(self.inner_scaled)

    def inner_scaled(self, layer: Layer) -> Layer:
        if not isinstance(layer, LowRank):
            return layer.with_alpha() if self.dialect.alpha == "constant" else layer
        keeps = self.dialect.alpha == "keep" and self.style_of(layer) == "kohya"
        return layer if keeps else rescaled(layer, self.constant)

    def style_of(self, layer: Layer) -> str:
        """Choose the style of a layer: only kohya's has a suffix for a Tucker core."""
        return "kohya" if "mid" in layer.tensors() else self.style

    def needs_values(self, layout: Layer) -> bool:
        """Return whether the shapes or dtypes of the written tensors depend on values."""
        undecided = self.dtype is None and isinstance(layout.tensors().get("up"), Undecided)
        return undecided or fuse.depends(layout)

    def tensors(self, stem: str, parts: Parts, layer: Layer) -> dict[str, Array | Spec]:
        """Return a layer's tensors by key; its alpha is a `Spec` that `values` fills in."""
        module = parts[0].module
        style, roles = self.style_of(layer), _roles(layer, self.dialect).items()
        tensors = {spelled(stem, self.dialect.suffix(role, module, style)): t for role, t in roles}
        if layer.own_alpha is not None:
            tensors[f"{stem}.alpha"] = Spec((), "F32")
        if "lokr" in self.dialect.holds and self.widens(parts, layer):
            import numpy as np

            tensors[f"{stem}.reshape_weight"] = np.asarray(layer.shape, dtype=np.int64)
        return tensors

    def widens(self, parts: Parts, layer: Layer) -> bool:
        """Return whether the weight must get more inputs, as for FLUX's control LoRAs: ComfyUI needs ``reshape_weight``."""
        usual = self.architecture.shapes.get(parts[0].module) if self.architecture and len(parts) == 1 else None
        wide = usual is not None and len(usual) == len(layer.shape) > 1 and layer.shape[0] == usual[0]
        return wide and usual is not None and layer.shape[1] > usual[1]

    def spec(self, key: str, tensor: Array | Spec) -> Spec:
        """Return the shape and dtype that a tensor is written with."""
        return _cast_spec(tensor if isinstance(tensor, Spec) else Held(tensor), self.dtype)

    def values(self, stem: str, parts: Parts) -> dict[str, Array]:
        """Compute the arrays of a stem by key."""
        import numpy as np

        layer = self.layer(parts, self.lora.__getitem__)
        if self.dtype == "F16" and isinstance(layer, LowRank) and layer.mid is None and code(layer.up) != "F16":
            layer = _balanced(layer)
        return {
            key: np.asarray(layer.own_alpha, dtype=np.float32) if isinstance(t, Spec) else t
            for key, t in self.tensors(stem, parts, layer).items()
        }


def _component(module: str) -> str:
    return module.partition(".")[0]


def _shape_only(tensor: Array | Spec) -> Spec:
    return Spec(tuple(tensor.shape), code(tensor))


def _as_lora(layer: Layer, dialect: Dialect, module: str = "a part of a fused weight") -> Layer:
    """Return the LoRA with the same ΔW.

    Raises:
        LayerError: There is none.
    """
    if layer.rank is None or not layer.factored:
        raise LayerError(f"{module}: {dialect.name} can't hold this layer: {layer.no_factors}")
    if any(isinstance(t, Spec) for t in layer.tensors().values()):
        rows, columns = layer.shape[0], math.prod(layer.shape[1:])
        factors: tuple[Array | Spec, Array | Spec] = Spec((rows, layer.rank), "F32"), Spec((layer.rank, columns), "F32")
    else:
        factors = layer.factors()
    return low_rank(*factors, layer.shape, diff_b=layer.diff_b)


def _constant_alpha(layers: Iterable[Layer]) -> float | None:
    """Return the alpha that most LoRA layers have already, so that most stay as they are.

    Without LoRA layers it is the commonest rank, for layers that become LoRAs when they are joined.
    """
    listed = list(layers)
    alphas = [a for layer in listed if (a := _natural(layer))] or [float(layer.rank) for layer in listed if layer.rank]
    if not alphas:
        return None
    counts = Counter(alphas)
    return min(counts, key=lambda a: (-counts[a], a))


def _natural(layer: Layer) -> float | None:
    """Return the alpha with which ``up`` stays as it is; None if the layer isn't a LoRA."""
    if not isinstance(layer.inner, LowRank):
        return None
    return float(layer.inner.rank) if layer.inner.alpha is None else layer.inner.alpha


class Undecided(Spec):
    """A shape whose dtype depends on values: narrow when the scaled values fit it exactly, else float32."""

    __slots__ = ()


def rescaled(layer: LowRank, alpha: float | None) -> LowRank:
    """Return the same ΔW with another alpha, for which ``up`` is multiplied.

    ``up`` keeps its dtype when every value stays exact (a power of two, mostly) and becomes
    float32 otherwise.
    """
    ratio = layer.scale if alpha is None else layer.scale * layer.rank / alpha
    if ratio == 1.0:
        return layer if layer.alpha == alpha else replace(layer, alpha=alpha)
    bias = None if layer.up_bias is None else _times(layer.up_bias, ratio)
    return replace(layer, up=_times(layer.up, ratio), up_bias=bias, alpha=alpha)


def _times(tensor: Array | Spec, ratio: float) -> Array | Spec:
    if isinstance(tensor, Spec):
        wide = tensor.dtype in ("F32", "F64")
        return Spec(tensor.shape, tensor.dtype) if wide else Undecided(tensor.shape, "F32")
    if code(tensor) == "F64":
        return tensor * ratio
    wide_values = float32(tensor) * ratio
    if code(tensor) not in FLOATS:
        return wide_values
    narrow = _narrow(wide_values, tensor)
    exact = code(tensor) == "F32" or bool((float32(narrow) == wide_values).all())
    return narrow if exact else wide_values


def _narrow(values: Array, like: Array) -> Array:
    if is_torch(like):
        return values.to(like.dtype)
    import numpy as np

    with np.errstate(over="ignore"):
        return values.astype(like.dtype)


def _balanced(layer: LowRank) -> LowRank:
    """Return the same ΔW with factors that float16 rounds least."""
    up = matrix(layer.up)
    if not linalg.faint(up):
        return layer
    up, down = linalg.balanced(up, matrix(layer.down))
    return replace(layer, up=up.reshape(layer.up.shape), down=down.reshape(layer.down.shape))


def _roles(layer: Layer, dialect: Dialect) -> dict[str, Array | Spec]:
    """Return a layer's tensors by role, in the roles and shapes of the dialect's style."""
    tensors = layer.tensors()
    peft = dialect.style == "peft"
    if ("up_bias" in tensors and not peft) or ("diff_b" in tensors and peft):
        bias = layer.delta_bias()
        tensors = {role: t for role, t in tensors.items() if role not in ("up_bias", "diff_b")}
        tensors["up_bias" if peft else "diff_b"] = bias  # under PEFT's names the scale is 1, so none applies to it
    if layer.axis == "out":
        rest = len(layer.shape) - 1
        out = layer.shape[0]
        linear, conv = ((out,), (1, out, *[1] * (rest - 1))) if peft else ((out, 1), (out, *[1] * rest))
        shape = linear if rest == 1 else conv
        magnitude = tensors.pop("magnitude")
        tensors["row_magnitude" if peft else "magnitude"] = reshape(magnitude, shape)
    elif layer.axis == "in":
        tensors["magnitude"] = reshape(tensors["magnitude"], (1, layer.shape[1], *[1] * (len(layer.shape) - 2)))
    return tensors
