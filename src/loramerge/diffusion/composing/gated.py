"""Compositions by learned gates."""

from torch import Tensor

from ...errors import OptionError
from ...learned.attach import Site
from ...learned.gates import BlockGates, read
from .base import Call, composition


@composition("mole", source="Wu et al., 2024, MoLE, https://arxiv.org/abs/2404.13628; means over places", passes="1")
def mole(call: Call, *, gates: str = "") -> Tensor:
    """Run all LoRAs in one pass, at the weights that learned gates give them in each block.

    Args:
        call: One call of the denoiser.
        gates: The file that ``loramerge zip --preset mole --set gates=input`` wrote for these LoRAs.
    """
    found: BlockGates = call.once("gates", lambda: _read(call, gates))
    weights = call.weights

    def gate(module: str, site: Site, x: Tensor) -> Tensor:
        each = weights if site.convolution is None else weights[:, None, None]
        return found(module, site, x) * each

    return call.together(gate)


def _read(call: Call, path: str) -> BlockGates:
    if not path:
        raise OptionError(
            "The composition mole needs the file of its gates: gates=, -O gates=FILE. 'loramerge zip --preset mole "
            "--set gates=input' learns them."
        )
    found = read(path)
    found.check([use.lora for use in call.uses])
    return found.on(call.latents.device)
