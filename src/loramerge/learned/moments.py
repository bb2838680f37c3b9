"""The result of calibration: second moments of every module's inputs, summed up batch by batch.

With x the inputs that module sees while LoRA i acts on its own data, Cᵢ = E[x xᵀ], A the stacked
``down`` factors ``(R, n)`` of all LoRAs and Aᵢ those of LoRA i:

| kind | kept for each module | enough for |
|---|---|---|
| ``core`` | A Cᵢ Aᵀ, ``(R, R)`` per LoRA | global, layer, rank, core |
| ``gram`` | these, Σ Cᵢ ``(n, n)`` and Aᵢ Cᵢ ``(rᵢ, n)`` | column and full too |

Linear layers that get the very same tensor (the projections to q, k and v; all keys and values
of a prompt) share one Σ Cᵢ: for the attention of Stable Diffusion XL, 1.7 GB instead of 4.8.
"""

import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FileError, MergeError
from ..files.dialects.write import Group
from ..files.lora import LoRA
from ..files.storage.paths import path_of
from ..files.storage.reader import SafetensorsFile
from ..files.storage.texts import as_json, parsed
from ..files.storage.writer import write
from .attach import Site, fingerprints
from .state import group_of, tensor

Kind = Literal["core", "gram"]
KEY = "loramerge.moments"


@dataclass
class Module:
    """The sums of one module."""

    core: Tensor
    """Σ A x xᵀ Aᵀ by LoRA, ``(N, R, R)``, float64."""
    gram: Tensor | None
    """Σ x xᵀ over all LoRAs, ``(n, n)``, float32; None for the kind ``core``, and if another module keeps it."""
    cross: Tensor | None
    """Σ A x xᵀ of each row's own LoRA, ``(R, n)``, float64; None for the kind ``core``."""
    updates: list[int]
    """The number of batches that were added, by LoRA."""
    leader: str | None = None
    """The module that gets the same inputs and keeps the gram of both."""


@dataclass
class Moments:
    """Second moments of every module's inputs; each batch counts alike."""

    kind: Kind
    names: tuple[str, ...]
    """Names of the LoRAs, in order."""
    marks: tuple[str, ...] = ()
    """Their fingerprints, so that moments of other LoRAs are refused."""
    modules: dict[str, Module] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    """The things that they depend on: batches, seed, and the ``identity`` of the model and the data given to `calibrate`."""
    _inputs: dict[str, "_Same"] = field(default_factory=dict, repr=False, compare=False)
    """The last input of each module that keeps a gram."""

    def update(self, module: str, site: Site, lora: int, x: Tensor) -> None:
        """Add the inputs of one batch.

        Args:
            module: The module's name.
            site: Its factors.
            lora: Which LoRA acts.
            x: The inputs, ``(…, in)``, or ``(batch, in, height, width)`` of a convolution.

        Raises:
            MergeError: Modules that shared their inputs no longer do.
        """
        if module not in self.modules:
            self.modules[module] = self._begin(site, x)
        found = self.modules[module]
        # Half precision would lose small terms of the sums, so an autocast around the model must not reach here.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            wide = x.detach().float()
            inner = site.inner(wide, site.down.float())
            inner = inner.movedim(1, -1) if site.convolution is not None else inner
            inner = inner.reshape(-1, inner.shape[-1])
            # In float32 the sums would have negative eigenvalues, which decide the result where inputs show little.
            exact = inner.to(found.core.device).double()
            found.core[lora] += exact.T @ exact / len(exact)
            found.updates[lora] += 1
            if found.cross is None:
                return
            flat = _patches(wide, site).reshape(-1, site.columns)
            mine = site.slice(lora)
            found.cross[mine] += (inner[:, mine].T @ flat).to(found.cross) / len(flat)
            if found.gram is not None:
                found.gram += flat.T @ flat / len(flat)
                self._inputs[module] = _Same.of(x)
            elif not self._inputs[str(found.leader)].is_(x):
                raise MergeError(f"{module} was given the same tensor as {found.leader} at first, and now is not.")

    def _begin(self, site: Site, x: Tensor) -> Module:
        """Return a module's sums before the first batch."""
        (rank, n), count, device = site.down.shape, len(self.names), site.down.device
        lacking = device.type == "mps"  # Apple's GPUs have no float64
        core = torch.zeros(count, rank, rank, dtype=torch.float64, device="cpu" if lacking else device)
        if self.kind == "core":
            return Module(core, None, None, [0] * count)
        cross = torch.zeros(rank, n, dtype=torch.float32 if lacking else torch.float64, device=device)
        linear = site.convolution is None
        leader = next((name for name, same in self._inputs.items() if linear and same.is_(x)), None)
        return Module(core, None if leader else torch.zeros(n, n, device=device), cross, [0] * count, leader)

    def gram(self, module: str) -> Tensor | None:
        """Return Σ x xᵀ of a module, whichever module keeps it."""
        return self.modules[self.modules[module].leader or module].gram

    def batches(self, module: str) -> int:
        """Return how many batches of every LoRA were added.

        Raises:
            MergeError: Their numbers differ, so that some LoRAs would count more than others.
        """
        updates = self.modules[module].updates
        if len(set(updates)) != 1 or updates[0] < 1:
            raise MergeError(f"{module}: calibrated with {updates} batches of the LoRAs; wanted as many of each.")
        return updates[0]

    def check(self, loras: Sequence[LoRA]) -> None:
        """Refuse LoRAs other than those that the moments were taken with, or another order of them.

        Raises:
            MergeError: Their number, values or order differ.
        """
        if len(loras) != len(self.names):
            raise MergeError(f"The moments are of {len(self.names)} LoRAs, got {len(loras)}.")
        if self.marks and fingerprints(loras) != self.marks:
            raise MergeError(
                f"The moments were taken with {', '.join(self.names)}, and these LoRAs are others, have changed, "
                "or stand in another order. Way out: calibrate with them."
            )

    def tensors(self) -> list[Tensor]:
        """Return every sum, for several processes to average in place."""
        parts = [part for m in self.modules.values() for part in (m.core, m.gram, m.cross)]
        return [part for part in parts if part is not None]

    def averaged(self, other: "Moments") -> "Moments":
        """Return the mean of two calibrations with the same LoRAs."""
        if (self._leaders(), self.kind, self.marks) != (other._leaders(), other.kind, other.marks):
            raise MergeError("These moments were taken with other LoRAs, or are of another kind.")
        summed = {m: _sum(self.modules[m], other.modules[m]) for m in self.modules}
        identity = self.identity if self.identity == other.identity else {"mean of": [self.identity, other.identity]}
        return Moments(self.kind, self.names, self.marks, summed, identity)

    def _leaders(self) -> dict[str, str | None]:
        return {name: module.leader for name, module in self.modules.items()}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the moments to a safetensors file: whole, or not at all."""
        groups = [_group(name, module) for name, module in self.modules.items()]
        updates = {name: module.updates for name, module in self.modules.items()}
        said = {
            "kind": self.kind,
            "names": self.names,
            "marks": self.marks,
            "updates": updates,
            "leaders": self._leaders(),
            "identity": self.identity,
        }
        target = path_of(path)
        write(target, groups, {"format": "pt", KEY: as_json(said)})
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Moments":
        """Read moments from a file.

        Raises:
            FileError: The file can't be read, or holds no moments.
        """
        with closing(SafetensorsFile(path_of(path))) as file:
            try:
                said = parsed(file.metadata[KEY], str(path))
                modules = {
                    name: Module(
                        tensor(file, f"{name}.core"),
                        tensor(file, f"{name}.gram") if said["kind"] == "gram" and not said["leaders"][name] else None,
                        tensor(file, f"{name}.cross") if said["kind"] == "gram" else None,
                        updates,
                        said["leaders"][name],
                    )
                    for name, updates in said["updates"].items()
                }
                return cls(said["kind"], tuple(said["names"]), tuple(said["marks"]), modules, said["identity"])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise FileError(f"{path} holds no moments, or not all of them: {error} is missing or wrong.") from None


@dataclass(frozen=True)
class _Same:
    """A tensor remembered without keeping it in memory: a weak reference, and how often it was written to."""

    tensor: "weakref.ref[Tensor] | None"
    version: int

    @classmethod
    def of(cls, x: Tensor) -> "_Same":
        # Tensors of inference mode don't count writes, so they are never taken for the same.
        return cls(None, 0) if x.is_inference() else cls(weakref.ref(x), x._version)

    def is_(self, x: Tensor) -> bool:
        return self.tensor is not None and self.tensor() is x and x._version == self.version


def _patches(x: Tensor, site: Site) -> Tensor:
    """Return what each row of ``down`` is multiplied with: the input, or a convolution's patches of it."""
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
        a.leader,
    )


def _group(name: str, module: Module) -> Group:
    parts = {"core": module.core, "gram": module.gram, "cross": module.cross}
    return group_of(name, {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None})
