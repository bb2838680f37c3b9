"""Factors as torch tensors, and what tells one LoRA's from another's."""

import hashlib
from collections.abc import Sequence

from torch import Tensor

from ..errors import LoRAMergeError, MergeError
from ..layers import Layer
from ..lora import LoRA, in_one_library


def factors(lora: LoRA, module: str) -> tuple[Tensor, Tensor]:
    """``up`` ``(out, r)`` and ``down`` ``(r, in·kh·kw)``, float32 on the CPU, every scale folded in.

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
    try:
        up, down = layer.factors()
    except LoRAMergeError as error:
        raise type(error)(f"{lora.name}: {module}: {error}") from None
    return up.contiguous(), down.contiguous()


def fingerprints(loras: Sequence[LoRA]) -> tuple[str, ...]:
    """One mark a LoRA that changes with its modules and values, and not with its name."""
    return tuple(map(_fingerprint, loras))


def _fingerprint(lora: LoRA) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for module in sorted(lora):
        digest.update(module.encode())
        for tensor in _factors(lora, module, _layer(lora, module)):
            digest.update(tensor.numpy().data)
    return digest.hexdigest()
