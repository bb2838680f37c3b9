"""MoLE's gates: each LoRA's weight in a block of the model, from what the LoRAs compute there.

Wu et al., 2024, https://arxiv.org/abs/2404.13628, equations 8 to 16.  Their gates see the output of a whole block with
each LoRA, place by place, which costs one run of the block per LoRA and holds for one size of pictures.  These see what
each LoRA adds to the first module of the block that runs, as its mean over places.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FileError, OptionError
from ..files.architectures.blocks import block
from ..files.lora import LoRA
from ..files.storage.paths import path_of
from ..files.storage.reader import SafetensorsFile
from ..files.storage.texts import as_json, parsed
from ..files.storage.writer import write
from ..tensors import Float
from .attach import Site, fingerprints
from .state import group_of, tensor

KEY = "loramerge.gates"
PREFIX = "gates."
TEMPERATURE = "temperature"
Activation = Literal["softmax", "sigmoid"]


def activated(values: Tensor, kind: Activation, present: Sequence[int]) -> Tensor:
    """Return gates from numbers ``(…, N)``: softmax over the LoRAs that are present, or 2σ of each, 1 at 0.

    LoRAs that aren't present get 0.
    """
    there = torch.zeros(values.shape[-1], dtype=torch.bool, device=values.device)
    there[list(present)] = True
    if kind == "softmax":
        return values.masked_fill(~there, -torch.inf).softmax(-1)
    return 2 * values.sigmoid() * there


def balance(gates: Float[Tensor, "blocks N"]) -> Float[Tensor, ""]:
    """Return the paper's balance loss −log Πᵢ qᵢ: lowest where all LoRAs have the same share q of all gates."""
    mean = gates.mean(0)
    return -(mean / mean.sum()).log().sum()


@dataclass(eq=False)
class BlockGates:
    """Gates that follow the picture: ``gates(module, site, x)`` for `Attachment.gates`."""

    weights: Mapping[str, Tensor]
    """By the module of a block that runs first: ``(features, N)``, features = LoRAs there · the module's outputs."""
    temperature: Tensor
    """Logarithm of τ, by which numbers are divided before the activation: shape ``()``."""
    present: Mapping[str, Sequence[int]]
    """By the same modules: the LoRAs that the block has."""
    activation: Activation
    architecture: str | None
    marks: tuple[str, ...]
    """The LoRAs that they were learned for, `fingerprints`."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    opened: dict[str, Tensor] = field(default_factory=dict)
    """The gates of the pass at work, ``(rows, N)``, by block."""

    def __call__(self, module: str, site: Site, x: Tensor) -> Tensor:
        """Return each LoRA's weight in a module, as `Site.forward` takes it; 1 in blocks without gates."""
        name = block(module, self.architecture)
        if module in self.weights:
            self.opened[name] = self._opened(module, site, x)
        gate = self.opened.get(name)
        if gate is None:
            gate = x.new_ones(1, len(self.marks))
        if site.convolution is not None:
            return gate[:, :, None, None]
        return gate.reshape(len(gate), *(1,) * (x.ndim - 2), -1)

    def _opened(self, module: str, site: Site, x: Tensor) -> Tensor:
        inner = site.inner(x, site.down)
        inner = inner if site.convolution is None else inner.movedim(1, -1)
        up = site.up.to(inner)
        each = torch.cat([inner[..., rows] @ up[:, rows].T for rows in site.slices.values()], -1)
        each = each.to(torch.promote_types(each.dtype, torch.float32))
        features = F.layer_norm(each, each.shape[-1:]).flatten(1, -2).mean(1) if each.ndim > 2 else each
        weights = self.weights[module].to(features)
        return activated(features @ weights / self.temperature.exp(), self.activation, self.present[module])

    def on(self, device: torch.device | None = None) -> "BlockGates":
        """Return the gates on a device, as they are now: they learn no more."""
        weights = {module: value.detach().to(device) for module, value in self.weights.items()}
        return replace(self, weights=weights, temperature=self.temperature.detach().to(device), opened={})

    def check(self, loras: Sequence[LoRA]) -> None:
        """Refuse LoRAs that the gates weren't learned for.

        Raises:
            OptionError: They are others, or in another order.
        """
        if fingerprints(loras) != self.marks:
            raise OptionError(
                f"The gates were learned for {len(self.marks)} other LoRAs, or for these in another order; got "
                f"{', '.join(lora.name for lora in loras)}. Way out: loramerge zip --preset mole --set gates=input, for these."
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the gates to a file, which takes its name when it is complete; `read` reads it."""
        held = {**self.weights, TEMPERATURE: self.temperature}
        said = {
            "present": {module: list(those) for module, those in self.present.items()},
            "activation": self.activation,
            "architecture": self.architecture,
            "marks": self.marks,
            "provenance": self.provenance,
        }
        groups = [group_of(name, {PREFIX + name: value.detach().float()}) for name, value in held.items()]
        target = path_of(path)
        write(target, groups, {"format": "pt", KEY: as_json(said)})
        return target


def read(path: str | os.PathLike[str]) -> BlockGates:
    """Read gates that `BlockGates.save` wrote.

    Raises:
        FileError: The file can't be read, or holds no gates.
    """
    path = path_of(path)
    with closing(SafetensorsFile(path)) as file:
        try:
            said = parsed(file.metadata[KEY], KEY)
            present = {str(module): [int(i) for i in those] for module, those in said["present"].items()}
            marks, activation = tuple(map(str, said["marks"])), str(said["activation"])
            weights = {module: tensor(file, PREFIX + module) for module in present}
            wrong = [m for m, w in weights.items() if w.ndim != 2 or w.shape[1] != len(marks) or not w.isfinite().all()]
            wrong += [m for m, those in present.items() if not those or not all(0 <= i < len(marks) for i in those)]
            if wrong or activation not in ("softmax", "sigmoid") or not weights:
                raise ValueError(f"{(wrong or [activation])[0]!r}")
            temperature = tensor(file, PREFIX + TEMPERATURE).reshape(())
            architecture = None if said["architecture"] is None else str(said["architecture"])
            provenance = dict(said["provenance"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise FileError(f"{path} holds no gates, or not all of them: {error} is missing or wrong.") from None
    return BlockGates(weights, temperature, present, activation, architecture, marks, provenance)  # type: ignore[arg-type]
