"""What calibration remembers of the inputs of every module: second moments, streamed.

With x the inputs that module sees while LoRA i acts on its own data, Cᵢ = E[x xᵀ], A the stacked
``down`` factors ``(R, n)`` of all LoRAs and Aᵢ those of LoRA i:

| kind | kept for each module | enough for |
|---|---|---|
| ``core`` | A Cᵢ Aᵀ, ``(R, R)`` a LoRA | global, layer, rank, core |
| ``gram`` | these, Σ Cᵢ ``(n, n)`` and Aᵢ Cᵢ ``(rᵢ, n)`` | column and full too |
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dialects.write import Group
from ..errors import FileError, MergeError
from ..storage.reader import SafetensorsFile
from ..storage.writer import write
from ..tensors import Spec, code
from .attach import Site

Kind = Literal["core", "gram"]
KEY = "loramerge.moments"


@dataclass
class Module:
    """The sums of one module."""

    core: Tensor
    """Σ A x xᵀ Aᵀ by LoRA, ``(N, R, R)``, float64."""
    gram: Tensor | None
    """Σ x xᵀ over all LoRAs, ``(n, n)``, float32; None for the kind ``core``."""
    cross: Tensor | None
    """Σ A x xᵀ of each row's own LoRA, ``(R, n)``, float64; None for the kind ``core``."""
    updates: list[int]
    """How many batches were added, by LoRA."""


@dataclass
class Moments:
    """Second moments of every module's inputs, each batch counting alike."""

    kind: Kind
    names: tuple[str, ...]
    """Names of the LoRAs, in order."""
    modules: dict[str, Module] = field(default_factory=dict)

    def update(self, module: str, site: Site, lora: int, x: Tensor) -> None:
        """Add the inputs of one batch.

        Args:
            module: The module's name.
            site: Its factors.
            lora: Which LoRA acts.
            x: The inputs, ``(…, in)``, or ``(batch, in, height, width)`` of a convolution.
        """
        rank, n = site.down.shape
        found = self.modules.get(module)
        if found is None:
            count = len(self.names)
            device = site.down.device
            full = self.kind == "gram"
            found = self.modules[module] = Module(
                torch.zeros(count, rank, rank, dtype=torch.float64, device=device),
                torch.zeros(n, n, device=device) if full else None,
                torch.zeros(rank, n, dtype=torch.float64, device=device) if full else None,
                [0] * count,
            )
        with torch.no_grad():
            x = x.detach().float()
            inner = site.inner(x, site.down.float())
            inner = inner.movedim(1, -1) if site.convolution is not None else inner
            inner = inner.reshape(-1, rank)
            found.core[lora] += (inner.T @ inner).double() / len(inner)
            found.updates[lora] += 1
            if found.gram is None or found.cross is None:
                return
            flat = _patches(x, site).reshape(-1, n)
            found.gram += flat.T @ flat / len(flat)
            mine = site.slice(lora)
            found.cross[mine] += (inner[:, mine].T @ flat).double() / len(flat)

    def batches(self, module: str) -> int:
        """How many batches of every LoRA were added.

        Raises:
            MergeError: Their numbers differ, so that the sum of the moments is not balanced.
        """
        updates = {count for count in self.modules[module].updates if count}
        if len(updates) != 1:
            raise MergeError(
                f"{module}: calibrated with {self.modules[module].updates} batches a LoRA; wanted as many of each."
            )
        return updates.pop()

    def averaged(self, other: "Moments") -> "Moments":
        """The mean of two calibrations with the same LoRAs."""
        if set(self.modules) != set(other.modules) or self.kind != other.kind:
            raise MergeError("These moments were taken with other LoRAs, or are of another kind.")
        return Moments(self.kind, self.names, {m: _sum(self.modules[m], other.modules[m]) for m in self.modules})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the moments to a safetensors file: whole, or not at all."""
        groups = [_group(name, module) for name, module in self.modules.items()]
        said = {"kind": self.kind, "names": self.names, "updates": {n: m.updates for n, m in self.modules.items()}}
        write(Path(path), groups, {"format": "pt", KEY: json.dumps(said)})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Moments":
        """Moments from a file.

        Raises:
            FileError: The file can't be read, or holds no moments.
        """
        file = SafetensorsFile(Path(path))
        try:
            said = json.loads(file.metadata[KEY])
        except (KeyError, ValueError):
            raise FileError(f"{path} holds no moments: its metadata lack {KEY!r}.") from None

        def tensor(key: str) -> Tensor | None:
            return torch.from_numpy(file[key].read().copy()) if key in file else None

        found = {}
        for name, updates in said["updates"].items():
            core = tensor(f"{name}.core")
            if core is None:
                raise FileError(f"{path}: the moments of {name} are missing.")
            found[name] = Module(core, tensor(f"{name}.gram"), tensor(f"{name}.cross"), updates)
        return cls(said["kind"], tuple(said["names"]), found)


def _patches(x: Tensor, site: Site) -> Tensor:
    """What each row of ``down`` is multiplied with: the input, or a convolution's patches of it."""
    if site.convolution is None:
        return x
    return F.unfold(x, site.shape[2:], **site.convolution).movedim(1, -1)


def _sum(a: Module, b: Module) -> Module:
    def add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else x + y

    return Module(
        a.core + b.core,
        add(a.gram, b.gram),
        add(a.cross, b.cross),
        [x + y for x, y in zip(a.updates, b.updates, strict=True)],
    )


def _group(name: str, module: Module) -> Group:
    parts = {"core": module.core, "gram": module.gram, "cross": module.cross}
    held = {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items() if tensor is not None}
    specs = {key: Spec(tuple(tensor.shape), code(tensor)) for key, tensor in held.items()}
    return Group(name, specs, lambda: held)
