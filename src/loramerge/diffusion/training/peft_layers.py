"""Put PEFT's trainable layers into the components of a model, and take them out again."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import OptionError, needed
from ...files.architectures import ARCHITECTURES
from ...layers import Layer
from ...layers.lowrank import LowRank
from ..apply import check_bare, modules
from ..denoiser import Denoiser
from .settings import FLOW_ATTENTION, TEXT, UNET, Targets, TrainSettings

ADAPTER = "loramerge"
IN_A_BLOCK = re.compile(r"\.\d+\.")
"""Found in the path of a module that is inside a numbered block."""


@dataclass(frozen=True)
class Injected:
    """The trainable layers of a model."""

    layers: Mapping[str, Any]
    """PEFT's layers by loramerge's names of the modules."""
    scale: float

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return every factor, ``MODULE/down`` and ``MODULE/up``, float32."""
        found = {}
        for module, layer in self.layers.items():
            found[f"{module}/down"] = layer.lora_A[ADAPTER].weight
            found[f"{module}/up"] = layer.lora_B[ADAPTER].weight
        return found

    def taken(self) -> dict[str, Layer]:
        """Copy the factors into layers of loramerge."""
        return {module: self._taken(layer) for module, layer in self.layers.items()}

    def _taken(self, layer: Any) -> Layer:
        down, up = _array(layer.lora_A[ADAPTER].weight), _array(layer.lora_B[ADAPTER].weight)
        return LowRank(down=down, up=up, alpha=self.scale * down.shape[0])


def _array(tensor: Tensor) -> Any:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()


@contextmanager
def injected(denoiser: Denoiser, settings: TrainSettings) -> Iterator[Injected]:
    """Put trainable LoRAs into the denoiser, and its text encoders if they learn; the model is restored afterwards.

    Raises:
        OptionError: The pipeline has LoRAs already.
        MissingExtraError: PEFT is not installed.
    """
    with needed("Training"):
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    check_bare(denoiser.pipe)
    models = denoiser.models
    learning = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    layers: dict[str, Any] = {}
    try:
        with seeded(settings.seed, denoiser.device):
            for component, model in models.items():
                config = LoraConfig(
                    r=settings.rank,
                    lora_alpha=settings.scale * settings.rank,  # type: ignore[arg-type]
                    lora_dropout=settings.dropout,
                    init_lora_weights="gaussian",
                    target_modules=_targets(denoiser, component, settings.targets),
                )
                inject_adapter_in_model(config, model, ADAPTER)
                found = {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}
                layers |= {f"{component}.{path}": layer for path, layer in found.items()}
        for layer in layers.values():
            layer.lora_A[ADAPTER].float()
            layer.lora_B[ADAPTER].float()
            layer.lora_dropout.train()
        yield Injected(layers, settings.scale)
    finally:
        for model in models.values():
            _eject(model)
        for parameter in learning:
            parameter.requires_grad_(True)


def _targets(denoiser: Denoiser, component: str, targets: Targets) -> list[str]:
    """Return the modules to train, or the endings of their names.

    Raises:
        OptionError: The model has no such modules.
    """
    if component != denoiser.family.denoiser:
        return list(TEXT[targets])
    if denoiser.family.flow is None:
        return list(UNET[targets])
    if targets == "all":
        raise OptionError("A transformer has no layers besides its blocks' to train. Way out: targets 'transformers'.")
    linear = [path for path, module in denoiser.model.named_modules() if isinstance(module, nn.Linear)]
    inside = [path for path in linear if IN_A_BLOCK.search(path)]
    return inside if targets == "transformers" else [path for path in inside if path.endswith(FLOW_ATTENTION)]


def _eject(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    vars(model).pop("peft_config", None)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global RNG inside the block and restore it afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def architecture_of(denoiser: Denoiser, trained: Iterable[str]) -> str | None:
    """Return the model's family, or else one that has modules of these names, or None."""
    there = modules(denoiser.pipe)
    names = set(trained)
    known = [ARCHITECTURES[name] for name in denoiser.family.architectures]
    own = f"{denoiser.family.denoiser}."
    whole = [a.name for a in known if all(there.get(m) == a.shapes[m] for m in a.shapes if m.startswith(own))]
    alike = [a.name for a in known if names <= set(a.shapes)]
    return next(iter([*whole, *alike]), None)
