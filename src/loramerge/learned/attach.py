"""LoRAs attached to a model by forward hooks: they work from their factors, and the weights don't change.

A layer adds up · (down · diag(m)) x to its module's output, for all LoRAs at once: one pair of thin
products, no ΔW, no copy of x per LoRA.  With row masks, one pass over a batch applies a different LoRA
to each row: all teachers of ZipLoRA together.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MergeError, within
from ..files.lora import LoRA
from ..layers import Layer
from ..layers.base import in_one_library
from ..tensors import Float, Shape

Models = Mapping[str, nn.Module]
"""The model's components by name: ``{"unet": unet}``, ``{"transformer": …, "text_encoder": …}``."""


Gates: TypeAlias = Callable[[str, "Site", Tensor], Tensor]
"""``gates(module, site, x)``: each LoRA's weight in a module, of the shape that `Site.forward` takes."""


class Site(nn.Module):
    """One module of the model where LoRAs act.

    Every scale is folded into ``down``, of R = Σr rows and n = in·kh·kw columns; row k belongs to the LoRA ``owner[k]``.
    """

    up: Float[Tensor, "out R"]
    down: Float[Tensor, "R n"]
    owner: Tensor

    def __init__(
        self,
        found: Mapping[int, tuple[Tensor, Tensor]],
        target: nn.Linear | nn.Conv2d,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        device = device or target.weight.device
        self.shape = tuple(target.weight.shape)
        self.slices: dict[int, slice] = {}
        start = 0
        for i, (up, _) in found.items():
            self.slices[i] = slice(start, start + up.shape[1])
            start += up.shape[1]
        owners = [i for i, rows in self.slices.items() for _ in range(rows.start, rows.stop)]
        self.register_buffer("up", torch.cat([up for up, _ in found.values()], 1).to(device, dtype))
        self.register_buffer("down", torch.cat([down for _, down in found.values()], 0).to(device, dtype))
        self.register_buffer("owner", torch.tensor(owners, device=device))
        self.convolution = _convolution(target)

    @property
    def columns(self) -> int:
        """Columns of ΔW, in·kh·kw."""
        return int(self.down.shape[1])

    @property
    def present(self) -> list[int]:
        """Indices of the LoRAs that have the module, in order."""
        return list(self.slices)

    def slice(self, lora: int) -> slice:
        """Return the rows of ``down`` and columns of ``up`` that belong to a LoRA; none if it lacks the module."""
        return self.slices.get(lora, slice(0, 0))

    def _dense_is_cheaper(self, x: Tensor) -> bool:
        """Return whether forming ΔW once takes fewer operations than two thin products per token."""
        rank, columns, rows = self.down.shape[0], self.columns, self.up.shape[0]
        tokens = x.numel() // x.shape[1] if self.convolution is not None else x.numel() // columns
        return rank * rows * columns + tokens * rows * columns < tokens * rank * (rows + columns)

    def inner(self, x: Tensor, down: Tensor) -> Tensor:
        """Return ``down x``; the rank is its last axis in a linear layer and its second in a convolution."""
        down = down.to(x.dtype)
        if self.convolution is None:
            return F.linear(x, down)
        return F.conv2d(x, down.reshape(down.shape[0], *self.shape[1:]), **self.convolution)

    def outer(self, inner: Tensor) -> Tensor:
        """Apply ``up`` to a result of `inner`."""
        up = self.up.to(inner.dtype)
        return F.linear(inner, up) if self.convolution is None else F.conv2d(inner, up[:, :, None, None])

    def forward(
        self, x: Tensor, down: Tensor | None = None, rows: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """Return what the LoRAs add to the module's output.

        Args:
            x: The module's input.
            down: Used instead of the site's own ``down``.
            rows: The LoRA that acts on each row of the batch, a negative number for none;
                None for all LoRAs on every row.
            gate: Each LoRA's weight, of a shape that broadcasts to ``(batch, tokens, N)``, or to ``(batch, N, h, w)``
                of a convolution's output; None for 1.
        """
        down = self.down if down is None else down
        if rows is None and gate is None and self._dense_is_cheaper(x):
            weight = (self.up.to(x.dtype) @ down.to(x.dtype)).reshape(self.shape)
            return F.linear(x, weight) if self.convolution is None else F.conv2d(x, weight, **self.convolution)
        inner = self.inner(x, down)
        if gate is not None:
            inner = inner * gate.to(inner).index_select(-1 if self.convolution is None else 1, self.owner)
        return self.outer(inner if rows is None else inner * self._mask(inner, rows))

    def _mask(self, inner: Tensor, rows: Tensor) -> Tensor:
        """Return 1 where the rank belongs to the row's LoRA and 0 elsewhere, to multiply `inner` with."""
        if len(rows) != inner.shape[0]:
            raise MergeError(
                f"the module's input has a batch of {inner.shape[0]}, but the data have a batch of {len(rows)}."
            )
        mask = (self.owner[None, :] == rows.to(self.owner.device)[:, None]).to(inner.dtype)
        if self.convolution is not None:
            return mask[:, :, None, None]
        return mask.reshape(len(rows), *(1,) * (inner.ndim - 2), -1)


def _convolution(target: nn.Linear | nn.Conv2d) -> dict[str, Any] | None:
    if not isinstance(target, nn.Conv2d):
        return None
    if target.groups != 1 or target.padding_mode != "zeros":
        raise MergeError(
            "it is a convolution with groups or padding other than zeros, which LoRAs of diffusion models don't adapt."
        )
    return {"stride": target.stride, "padding": target.padding, "dilation": target.dilation}


@dataclass
class Attachment:
    """LoRAs attached to a model, and what they do in the next pass."""

    sites: dict[str, Site]
    """By module."""
    downs: dict[str, Tensor] = field(default_factory=dict)
    """The student's ``down`` by module, used instead of the site's own in a pass without ``rows``."""
    rows: Tensor | None = None
    """The LoRA that acts on each row of the batch; None: all act, with ``downs``."""
    gates: Gates | None = None
    """Each LoRA's weight in every module; None: 1 everywhere."""
    active: bool = True
    """False turns all LoRAs off."""
    listeners: list[Any] = field(default_factory=list)
    """Called as ``listener(module, site, x)`` in every pass, active or not; calibration records inputs here."""
    seen: set[str] = field(default_factory=set)
    """The modules that have run."""

    def only(self, rows: Tensor) -> "Attachment":
        """Apply a single, unmodified LoRA to each batch row."""
        self.rows = rows
        return self

    def all(self) -> "Attachment":
        """Apply all LoRAs to every row."""
        self.rows = None
        return self

    def hook(self, module: str) -> Any:
        """Return the forward hook of a module."""
        site = self.sites[module]

        def add(target: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            self.seen.add(module)
            for listener in self.listeners:
                listener(module, site, x)
            if not self.active:
                return output
            down = None if self.rows is not None else self.downs.get(module)
            with within(module):
                gate = self.gates(module, site, x) if self.gates else None
                return output + site(x, down, self.rows, gate).to(output.dtype)

        return add

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Turn the hooks off inside the block."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def check_all_ran(self) -> None:
        """Refuse a model that never ran one of the modules, so that nothing could be learned there.

        Raises:
            MergeError: A module was not run.
        """
        idle = [module for module in self.sites if module not in self.seen]
        if idle:
            raise MergeError(
                f"predict never runs {idle[0]}{f' and {len(idle) - 1} more modules' * (len(idle) > 1)}. "
                "Way out: give only the components that it runs, or leave the modules out: lora.exclude(…)."
            )


@contextmanager
def attach(
    models: Models, loras: Sequence[LoRA], dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Iterator[Attachment]:
    """Attach LoRAs to a model while the context lasts.

    Args:
        models: The components that the LoRAs may change.  A LoRA's modules in other components are
            left out.
        loras: Any number, of any ranks; a module may be in only some of them.
        dtype: The dtype that the factors are kept in; they are cast to the input's when they are used.
        device: The device that the factors are kept on; by default the weights', which an offloaded model has elsewhere.

    Raises:
        MergeError: The model has none of the modules, lacks one of them, or has it in another shape; or PEFT
            adapters are active there, whose effect would be counted twice.
    """
    sites: dict[str, Site] = {}
    handles = []
    attachment = Attachment(sites)
    try:
        for module, owners in _targets(models, loras).items():
            target = _target(models, module, {loras[i].name: loras[i].layout(module).shape for i in owners})
            found = {i: factors(loras[i], module) for i in owners}
            with within(module):
                sites[module] = Site(found, target, dtype, device)
            handles.append(target.register_forward_hook(attachment.hook(module)))
        yield attachment
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(models: Models) -> Iterator[None]:
    """Turn off the gradients of the models' parameters inside the block."""
    learning = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _targets(models: Models, loras: Sequence[LoRA]) -> dict[str, list[int]]:
    """List, by module, the indices of the LoRAs that have it."""
    found: dict[str, list[int]] = {}
    for i, lora in enumerate(loras):
        for module in lora:
            if module.partition(".")[0] in models:
                found.setdefault(module, []).append(i)
    if not found:
        some = next((next(iter(lora)) for lora in loras if len(lora)), "none")
        raise MergeError(
            f"None of the LoRAs' modules, such as {some}, is in the model's components {', '.join(models)}."
        )
    return found


def _target(models: Models, module: str, shapes: Mapping[str, Shape]) -> nn.Linear | nn.Conv2d:
    """Return the model's module, taken out of PEFT's wrapper if there is one.

    Args:
        shapes: The shape of the weight that each LoRA was made for, by the LoRA's name.
    """
    component, _, path = module.partition(".")
    target = _submodule(models[component], path)
    if target is None:
        raise MergeError(f"The model has no module {module}: the LoRA {next(iter(shapes))} was made for another model.")
    base = getattr(target, "base_layer", None)
    if isinstance(base, nn.Module):
        if getattr(target, "active_adapters", ()) and not getattr(target, "disable_adapters", False):
            raise MergeError(
                f"{module}: PEFT adapters are active on the model, and would be counted twice. "
                "Way out: unload them, or disable_adapters()."
            )
        target = base
    if not isinstance(target, nn.Linear | nn.Conv2d):
        raise MergeError(f"{module} is a {type(target).__name__} in the model; wanted a Linear or a Conv2d.")
    for name, shape in shapes.items():
        if tuple(target.weight.shape) != shape:
            raise MergeError(
                f"{module} has the shape {tuple(target.weight.shape)} in the model and {shape} in the LoRA {name}, "
                "which was made for another model."
            )
    return target


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    # transformers 5 leaves text_model. out of the names in one of CLIP's two classes.
    for name in (path, path.removeprefix("text_model.")):
        with suppress(AttributeError):
            return model.get_submodule(name)
    return None


def factors(lora: LoRA, module: str) -> tuple[Tensor, Tensor]:
    """Return ``up`` ``(out, r)`` and ``down`` ``(r, in·kh·kw)``, float32 on the CPU, every scale folded in.

    Raises:
        NoFactorsError: The layer has no low-rank form.
        MergeError: The layer changes the module's bias too, which learning would lose.
    """
    layer = _layer(lora, module)
    if layer.delta_bias() is not None:
        raise MergeError(
            f"{lora.name}: {module} changes a bias too, which learned merges don't do. "
            "Ways out: a merge with plain weights, or the LoRA without the module: lora.exclude(…)."
        )
    return _factors(lora, module, layer)


def _layer(lora: LoRA, module: str) -> Layer:
    return in_one_library([lora[module]], "cpu")[0]


def _factors(lora: LoRA, module: str, layer: Layer) -> tuple[Tensor, Tensor]:
    with within(f"{lora.name}: {module}"):
        up, down = layer.factors()
    return up.contiguous(), down.contiguous()


def fingerprints(loras: Sequence[LoRA]) -> tuple[str, ...]:
    """Return one hash per LoRA, of its modules and their values; its name doesn't count."""
    return tuple(map(_fingerprint, loras))


def _fingerprint(lora: LoRA) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for module in sorted(lora):
        digest.update(module.encode())
        for tensor in _factors(lora, module, _layer(lora, module)):
            digest.update(tensor.numpy().data)
    return digest.hexdigest()
