"""ComfyUI's package of this name, as far as the nodes use it: a model here is the start of the names of its weights."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Model:
    """A model whose patches are listed as they were given."""

    begins: str
    patches: tuple[tuple[dict[str, Any], float], ...] = ()

    @property
    def model(self) -> str:
        return self.begins

    def patched(self, tensors: dict[str, Any], strength: float) -> "Model":
        return replace(self, patches=(*self.patches, (tensors, strength)))


@dataclass(frozen=True)
class Clip(Model):
    """Text encoders."""

    @property
    def cond_stage_model(self) -> str:
        return self.begins


class Names(dict[str, str]):
    """Every name that begins as a model's weights do."""

    begins: tuple[str, ...] = ()

    def __contains__(self, name: object) -> bool:
        return str(name).startswith(self.begins) and not str(name).endswith(("_A", "_B", "_down", "_up", ".weight"))
