"""Load LoRAs into a pipeline of diffusers and unload them: each module becomes W + Σ wᵢ ΔWᵢ, or there is an error."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import MergeError, OptionError, first_line
from ..files.lora import LoRA

WAYS_OUT = "Ways out: 'loramerge bake' into the model, or exclude the modules."
SAMPLES = 256
"""Number of values per parameter, at least, that a fingerprint hashes."""


@contextmanager
def applied(pipe: Any, loras: Sequence[tuple[LoRA, float]]) -> Iterator[None]:
    """Load LoRAs at their weights inside the block and unload them at the end.

    Raises:
        OptionError: There are LoRAs in the pipeline already, diffusers loads none into it, or it has two denoisers.
        MergeError: A LoRA has modules or shapes that the model doesn't have, or diffusers left some out.
        DialectError: diffusers' file format can't hold a layer.
        NumberError: A value of a LoRA is NaN or infinite.
    """
    check_bare(pipe)
    check_fits(pipe, [lora for lora, _ in loras])
    names = [f"loramerge_{i}" for i in range(len(loras))]
    try:
        for name, (lora, _) in zip(names, loras, strict=True):
            _load(pipe, lora, name)
        if names:
            pipe.set_adapters(names, adapter_weights=[weight for _, weight in loras])
        yield
    finally:
        if names:
            pipe.unload_lora_weights()


def check_bare(pipe: Any) -> None:
    """Refuse a pipeline with LoRAs of its own.

    Raises:
        OptionError: It has some.
    """
    there = pipe.get_list_adapters() if hasattr(pipe, "get_list_adapters") else {}
    if any(there.values()):
        raise OptionError(f"The pipeline has LoRAs already: {there}. Way out: unload_lora_weights().")


def check_fits(pipe: Any, loras: Iterable[LoRA]) -> None:
    """Refuse LoRAs whose modules or shapes the pipeline doesn't have.

    Raises:
        OptionError: diffusers loads no LoRAs into the pipeline, or it has two denoisers.
        MergeError: One was made for another model.
    """
    given = list(loras)
    if given:
        _check_takes(pipe)
    weights = modules(pipe)
    for lora in given:
        _check(lora, weights)


def _check_takes(pipe: Any) -> None:
    name = type(pipe).__name__
    if not hasattr(pipe, "load_lora_weights"):
        raise OptionError(f"diffusers loads no LoRAs into a {name}. Way out: 'loramerge bake' into the model.")
    if getattr(pipe, "transformer_2", None) is not None:
        raise OptionError(
            f"This {name} has two denoisers, transformer and transformer_2, each with LoRAs of its own, and a LoRA doesn't "
            "say whose it is. Way out, in Python: pipe.load_lora_weights(lora.state_dict('diffusers-peft')), with "
            "load_into_transformer_2=True for the second."
        )


def check_loads(pipe: Any, loras: Sequence[LoRA]) -> None:
    """Refuse LoRAs that the pipeline can't load completely, by loading and unloading each.

    Raises:
        MergeError: A LoRA was made for another model, or diffusers left a part of it out.
        DialectError: diffusers' file format can't hold a layer.
        NumberError: A value is NaN or infinite.
    """
    check_fits(pipe, loras)
    for lora in loras:
        with applied(pipe, [(lora, 1.0)]):
            pass


def modules(pipe: Any) -> dict[str, tuple[int, ...]]:
    """Return the weight shape of every module of a pipeline, by loramerge's names."""
    return {
        _named(component, path): tuple(module.weight.shape)
        for component, path, module in _walk(pipe)
        if getattr(module, "weight", None) is not None
    }


def fingerprint(pipe: Any) -> str:
    """Return a hash that identifies a model's weights: SHA-256 of values spread over every parameter."""
    import torch

    whole = hashlib.sha256()
    for component, model in _models(pipe):
        for name, parameter in model.named_parameters():
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // SAMPLES)].to("cpu", torch.float32).numpy()
            whole.update(f"{component}.{name} {tuple(parameter.shape)} ".encode() + some.tobytes())
    return whole.hexdigest()[:16]


def _models(pipe: Any) -> Iterator[tuple[str, Any]]:
    import torch

    for component, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            yield component, model


def _walk(pipe: Any) -> Iterator[tuple[str, str, Any]]:
    for component, model in _models(pipe):
        for path, module in model.named_modules():
            yield component, path, module


def _named(component: str, path: str) -> str:
    """Return loramerge's name of a module: transformers 5 leaves ``text_model.`` out in one of its CLIP classes."""
    if component.startswith("text_encoder") and path.startswith(("encoder.", "embeddings.", "final_layer_norm")):
        path = f"text_model.{path}"
    return f"{component}.{path}"


def _check(lora: LoRA, weights: Mapping[str, tuple[int, ...]]) -> None:
    lacking = [module for module in lora if module not in weights]
    if lacking:
        raise MergeError(
            f"{lora.name} ({lora.architecture or 'unknown family'}) changes {len(lacking)} of {len(lora)} modules that the "
            f"model doesn't have, such as {lacking[0]}. Is it for another base model?{_unnamed(lora)}"
        )
    for module in lora:
        layout = lora.layout(module)
        if layout.shape != weights[module] and not (layout.bias_only and layout.fits(weights[module])):
            raise MergeError(
                f"{lora.name}: {module} has shape {lora.layout(module).shape}, and {weights[module]} in the model. "
                "Is it for another base model?"
            )


def _unnamed(lora: LoRA) -> str:
    if lora.architecture:
        return ""
    return " If it is for this one, say its family, by which its modules are named: --architecture, or architecture=."


def _load(pipe: Any, lora: LoRA, adapter: str) -> None:
    """Load a LoRA and check that each module arrived: diffusers skips unknown keys with only a line in its log."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tensors = lora.state_dict("diffusers")
    try:
        pipe.load_lora_weights(tensors, adapter_name=adapter)
    except (RuntimeError, ValueError, KeyError) as error:
        raise MergeError(f"diffusers can't load {lora.name}: {first_line(error)} {WAYS_OUT}") from error
    there = {
        _named(component, path)
        for component, path, module in _walk(pipe)
        if isinstance(module, BaseTunerLayer) and any(adapter in getattr(module, n) for n in module.adapter_layer_names)
    }
    lost = [module for module in lora if module not in there]
    if lost:
        raise MergeError(
            f"diffusers left out {len(lost)} of {len(lora)} modules of {lora.name}, such as {lost[0]} "
            f"({lora.layout(lost[0]).kind}). {WAYS_OUT}"
        )
