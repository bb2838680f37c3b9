"""LoRAs at work inside a model, without changing its weights: by forward hooks, in factors.

A layer adds up · (down · diag(m)) x to its module's output, for all LoRAs at once: one pair of thin
products, no ΔW, no copy of x for each LoRA.  By row masks one pass over a batch applies another
LoRA to every row: all teachers of ZipLoRA together.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MergeError
from ..layers import Layer
from ..lora import LoRA

Models = Mapping[str, nn.Module]
"""The model's components by name: ``{"unet": unet}``, ``{"transformer": …, "text_encoder": …}``."""


class Site(nn.Module):
    """One module of the model where LoRAs act.

    ``up`` is ``(out, R)``, ``down`` ``(R, in·kh·kw)`` with every scale folded in, R = Σr; row k
    belongs to the LoRA ``owner[k]``.
    """

    up: Tensor
    down: Tensor
    owner: Tensor

    def __init__(self, layers: Mapping[int, Layer], count: int, target: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        device = next(target.parameters()).device
        factors = {i: tuple(torch.as_tensor(t).float() for t in layer.factors()) for i, layer in layers.items()}
        self.count = count
        self.shape = next(iter(layers.values())).shape
        owners = [i for i, (up, _) in factors.items() for _ in range(up.shape[1])]
        self.register_buffer("up", torch.cat([up for up, _ in factors.values()], 1).to(device, dtype))
        self.register_buffer("down", torch.cat([down for _, down in factors.values()], 0).to(device, dtype))
        self.register_buffer("owner", torch.tensor(owners, device=device))
        self.convolution = _convolution(target)

    @property
    def columns(self) -> int:
        """Columns of ΔW, in·kh·kw."""
        return int(self.down.shape[1])

    def slice(self, lora: int) -> slice:
        """The rows of ``down`` and columns of ``up`` that are a LoRA's."""
        mine = (self.owner == lora).nonzero().flatten()
        return slice(int(mine[0]), int(mine[-1]) + 1) if len(mine) else slice(0, 0)

    def _dense_is_cheaper(self, x: Tensor) -> bool:
        """Whether one ΔW takes fewer operations than two thin products for each token."""
        rank, columns, rows = self.down.shape[0], self.columns, self.up.shape[0]
        tokens = x.numel() // x.shape[1] if self.convolution is not None else x.numel() // columns
        return rank * rows * columns + tokens * rows * columns < tokens * rank * (rows + columns)

    def inner(self, x: Tensor, down: Tensor) -> Tensor:
        """``down x``, with the rank as the last axis of a linear layer's and the second of a convolution's."""
        down = down.to(x.dtype)
        if self.convolution is None:
            return F.linear(x, down)
        return F.conv2d(x, down.reshape(down.shape[0], *self.shape[1:]), **self.convolution)

    def outer(self, inner: Tensor) -> Tensor:
        """``up`` of what `inner` gave."""
        up = self.up.to(inner.dtype)
        return F.linear(inner, up) if self.convolution is None else F.conv2d(inner, up[:, :, None, None])

    def forward(self, x: Tensor, down: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """What the LoRAs add to the module's output.

        Args:
            x: The module's input.
            down: Takes the place of ``down``.
            rows: For each row of the batch the LoRA that acts on it, none where it is negative;
                None for all LoRAs on every row.
        """
        down = self.down if down is None else down
        if rows is None and self._dense_is_cheaper(x):
            weight = (self.up.to(x.dtype) @ down.to(x.dtype)).reshape(self.shape)
            return F.linear(x, weight) if self.convolution is None else F.conv2d(x, weight, **self.convolution)
        inner = self.inner(x, down)
        if rows is None:
            return self.outer(inner)
        mask = (self.owner[None, :] == rows[:, None]).to(inner.dtype)
        if self.convolution is None:
            mask = mask.reshape(len(rows), *(1,) * (inner.ndim - 2), -1)
        else:
            mask = mask[:, :, None, None]
        return self.outer(inner * mask)


def _convolution(target: nn.Module) -> dict[str, Any] | None:
    if not isinstance(target, nn.Conv2d):
        return None
    if target.groups != 1 or target.padding_mode != "zeros":
        raise MergeError("it is a grouped or reflecting convolution, which LoRAs of diffusion models don't adapt")
    return {"stride": target.stride, "padding": target.padding, "dilation": target.dilation}


@dataclass
class Attachment:
    """LoRAs attached to a model, and what they do in the next pass."""

    sites: dict[str, Site]
    """By module."""
    downs: dict[str, Tensor] = field(default_factory=dict)
    """What takes the place of a site's ``down`` in a pass without rows: the student's."""
    rows: Tensor | None = None
    """For each row of the batch the LoRA that acts on it; None: all act, with ``downs``."""
    active: bool = True
    """Whether anything acts at all."""
    listeners: list[Any] = field(default_factory=list)
    """Called as ``listener(module, site, x)`` in every pass: calibration listens here."""

    def only(self, rows: Tensor) -> "Attachment":
        """Let one LoRA a row act, as it is."""
        self.rows = rows
        return self

    def all(self) -> "Attachment":
        """Let all LoRAs act on every row."""
        self.rows = None
        return self

    def hook(self, module: str) -> Any:
        """The forward hook of a module."""
        site = self.sites[module]

        def add(target: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.active:
                return output
            x = inputs[0]
            for listener in self.listeners:
                listener(module, site, x)
            down = None if self.rows is not None else self.downs.get(module)
            return output + site(x, down, self.rows).to(output.dtype)

        return add


@contextmanager
def attach(models: Models, loras: Sequence[LoRA], dtype: torch.dtype = torch.float32) -> Iterator[Attachment]:
    """Have LoRAs act in a model while the context lasts.

    Args:
        models: The components that the LoRAs may change.  A LoRA's modules in other components are
            left out.
        loras: Any number, of any ranks; each module may be in some of them only.
        dtype: What the factors are kept in; they are used in the dtype of the input.

    Raises:
        MergeError: No module is shared with the model, a module or its shape is missing in it, or PEFT
            adapters are active there, whose effect would be counted twice.
    """
    sites: dict[str, Site] = {}
    handles = []
    attachment = Attachment(sites)
    try:
        for module, layers in _targets(models, loras).items():
            target = _target(models, module, next(iter(layers.values())))
            try:
                sites[module] = Site(layers, len(loras), target, dtype)
            except MergeError as error:
                raise MergeError(f"{module}: {error}.") from None
            handles.append(target.register_forward_hook(attachment.hook(module)))
        yield attachment
    finally:
        for handle in handles:
            handle.remove()


def _targets(models: Models, loras: Sequence[LoRA]) -> dict[str, dict[int, Layer]]:
    """By module, the layers of the LoRAs that have it."""
    found: dict[str, dict[int, Layer]] = {}
    for i, lora in enumerate(loras):
        for module in lora:
            if module.partition(".")[0] in models:
                found.setdefault(module, {})[i] = lora[module]
    if not found:
        some = next((next(iter(lora)) for lora in loras if len(lora)), "none")
        raise MergeError(
            f"None of the LoRAs' modules, such as {some}, is in the model's components {', '.join(models)}."
        )
    return found


def _target(models: Models, module: str, layer: Layer) -> nn.Module:
    """The model's module, PEFT's wrapping looked through."""
    component, _, path = module.partition(".")
    try:
        target = models[component].get_submodule(path)
    except AttributeError:
        raise MergeError(f"The model has no module {module}: the LoRA was made for another one.") from None
    base = getattr(target, "base_layer", None)
    if isinstance(base, nn.Module):
        if getattr(target, "active_adapters", ()) and not getattr(target, "disable_adapters", False):
            raise MergeError(
                f"{module}: PEFT adapters are active on the model, and would be counted twice. "
                "Way out: unload them, or disable_adapters()."
            )
        target = base
    weight = getattr(target, "weight", None)
    if not isinstance(target, nn.Linear | nn.Conv2d) or not isinstance(weight, Tensor):
        raise MergeError(f"{module} is a {type(target).__name__} in the model; wanted a Linear or a Conv2d.")
    if tuple(weight.shape) != layer.shape:
        raise MergeError(f"{module} has the shape {tuple(weight.shape)} in the model and {layer.shape} in the LoRA.")
    return target
