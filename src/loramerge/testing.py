"""Random LoRAs and dense references, for loramerge's tests and for authors of dialects and methods."""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import OptionError, needed
from .files.architectures import ARCHITECTURES
from .files.lora import LoRA
from .layers import DoRA, Full, Layer, LoHa, LoKr, LowRank, Norm
from .tensors import Array, Shape, cast, parse_dtype

if TYPE_CHECKING:
    import numpy as np

    from .merging.methods import Method

    Random = np.random.Generator

Make = Callable[["Random", Shape, int, float | None, str], Layer]


def random_lora(
    architecture: str,
    *,
    kind: str = "lora",
    rank: int | Callable[[str], int] = 4,
    alpha: float | Callable[[str], float | None] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    dialect: str = "kohya",
    only: Callable[[str, Shape], bool] | None = None,
    name: str | None = None,
) -> LoRA:
    """Make a LoRA with random values for an architecture's real modules.

    Args:
        architecture: Name of the family.
        kind: ``"lora"``, ``"tucker"``, ``"loha"``, ``"loha-tucker"``, ``"lokr"``, ``"lokr-full"``,
            ``"lokr-w1"``, ``"lokr-both"``, ``"lokr-tucker"``, ``"full"``, ``"dora"`` or ``"dora-in"``.
        rank: Rank of the factors: one for all modules, or a function of the module's name.
        alpha: Alpha: one for all modules, or a function of the module's name; None for no alpha.
        dtype: Dtype of the tensors.
        seed: Values depend only on the seed and the module's name.
        dialect: The dialect that the LoRA will be saved in by default.
        only: Chooses modules by name and weight shape; by default the attention projections of
            the middle block (or of the first blocks of a transformer) and of the first layer
            of each text encoder.
        name: Name of the LoRA.

    Raises:
        OptionError: The choice by default finds no module in the architecture.
    """
    chosen = only or middle
    shapes = ARCHITECTURES[architecture].shapes
    layers: dict[str, Layer] = {}
    for module, shape in shapes.items():
        if chosen(module, shape):
            layers[module] = random_layer(
                shape,
                kind=kind,
                rank=rank(module) if callable(rank) else rank,
                alpha=alpha(module) if callable(alpha) else alpha,
                dtype=dtype,
                seed=zlib.crc32(f"{seed}/{module}".encode()),
            )
    if not layers and only is None:
        raise OptionError(f"random_lora chose no module of {architecture}. Way out: only=lambda module, shape: …")
    return LoRA(name=name or f"random-{seed}", architecture=architecture, dialect=dialect, layouts=layers)


def random_layer(
    shape: Shape,
    *,
    kind: str = "lora",
    rank: int = 4,
    alpha: float | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> Layer:
    """Make a layer with random values; the arguments are those of `random_lora`."""
    import numpy as np

    if len(shape) == 1:
        rng = np.random.default_rng(seed)
        return Norm(w_norm=_normal(rng, shape, dtype), b_norm=_normal(rng, shape, dtype))
    return KINDS[kind](np.random.default_rng(seed), shape, rank, alpha, dtype)


PLACES = re.compile(
    r"unet\.mid_block\.attentions\.0\.transformer_blocks\.0\.attn|transformer\.(\w*_)?(blocks|layers)\.0\.|"
    r"text_encoder(_\d)?\.(text_model\.encoder\.layers\.0\.self_attn|encoder\.block\.0\.layer\.0\.SelfAttention\.[qkvo]$)"
)


def middle(module: str, shape: Shape) -> bool:
    """Choose the attention projections in one block of every component."""
    return len(shape) >= 2 and PLACES.match(module) is not None


def everything(module: str, shape: Shape) -> bool:
    """Choose every weight that is a matrix or a convolution, except embeddings."""
    return len(shape) >= 2 and "embed_tokens" not in module and "embeddings" not in module and "shared" not in module


def weighted_sum(loras: Sequence[LoRA], weights: Iterable[float], module: str) -> Array:
    """Compute Σ wᵢ ΔWᵢ of a module in float64 from dense matrices, as a reference for merges."""
    import numpy as np

    total: Array = 0.0
    for lora, weight in zip(loras, weights, strict=True):
        if module in lora:
            total = total + weight * np.asarray(lora[module].delta(), dtype=np.float64)
    return total


def relative_error(found: Array, wanted: Array) -> float:
    """Return ‖found − wanted‖ / ‖wanted‖, in float64."""
    import numpy as np

    wanted = np.asarray(wanted, dtype=np.float64)
    difference = np.asarray(found, dtype=np.float64).reshape(wanted.shape) - wanted
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(wanted)), 1e-300))


def check_method(method: "Method | str", **options: Any) -> None:
    """Check a merge method by laws that hold for all of loramerge's own, on random layers.

    The result has the announced rank and shape and no NaN; it is in proportion to the LoRAs, zero where they are zero,
    and the same with numpy and torch.  Another test must compare the method with its formula, on dense matrices in
    float64.

    Args:
        method: The method, as `loramerge.merge` takes it.
        **options: The method's options.

    Raises:
        AssertionError: A law doesn't hold; the message names the law and the shape of the layers.
        LoRAMergeError: As from `loramerge.merge`.
    """
    from .merging.methods import find

    found = find(method)
    for shape in ((26, 18), (14, 6, 3, 3)):
        for law, holds in _laws(found, shape, options).items():
            assert holds, f"{found.name}, layers of the shape {shape}: it doesn't hold that {law}."


def _laws(method: "Method", shape: Shape, options: Mapping[str, Any]) -> dict[str, bool]:
    import numpy as np

    with needed("check_method"):
        import torch

    from .merging.verbs import merge

    layers = [random_layer(shape, rank=3, alpha=3.0, seed=seed) for seed in range(method.count or 3)]

    def merged(change: Callable[[Array], Array]) -> Array:
        changed = [{"unet.m": layer.map(change)} for layer in layers]
        loras = [LoRA(name="one", architecture=None, dialect="kohya", layouts=each) for each in changed]
        return np.asarray(merge(loras, method=method, rank=1000, **options)["unet.m"].delta(), dtype=np.float64)

    plain = merged(lambda factor: factor)
    doubled = merged(lambda factor: factor * np.float32(math.sqrt(2)))
    return {
        "the result is not zero": bool(plain.any()),
        "LoRAs of zeros give zeros": not merged(np.zeros_like).any(),
        "LoRAs twice as strong give twice the result": relative_error(doubled, 2.0 * plain) < 1e-4,
        "torch computes what numpy computes": relative_error(merged(torch.from_numpy), plain) < 1e-4,
    }


def _normal(rng: "Random", shape: Shape, dtype: str) -> Array:
    import numpy as np

    # A little below one, so that products of a few stay within float16.
    return cast(0.3 * rng.standard_normal(shape, dtype=np.float32), parse_dtype(dtype))


def _lora(rng: "Random", shape: Shape, rank: int, alpha: float | None, dtype: str) -> LowRank:
    tail = (1,) * (len(shape) - 2)
    return LowRank(
        down=_normal(rng, (rank, *shape[1:]), dtype), up=_normal(rng, (shape[0], rank, *tail), dtype), alpha=alpha
    )


def _tucker(rng: "Random", shape: Shape, rank: int, alpha: float | None, dtype: str) -> LowRank:
    if shape[2:] in ((), (1, 1)):
        return _lora(rng, shape, rank, alpha, dtype)
    return LowRank(
        down=_normal(rng, (rank, shape[1], 1, 1), dtype),
        mid=_normal(rng, (rank, rank, *shape[2:]), dtype),
        up=_normal(rng, (shape[0], rank, 1, 1), dtype),
        alpha=alpha,
    )


def _loha(rng: "Random", shape: Shape, rank: int, alpha: float | None, dtype: str) -> LoHa:
    columns = math.prod(shape[1:])
    sizes = {"hada_w1_a": (shape[0], rank), "hada_w1_b": (rank, columns)}
    sizes |= {"hada_w2_a": (shape[0], rank), "hada_w2_b": (rank, columns)}
    return LoHa(**{n: _normal(rng, s, dtype) for n, s in sizes.items()}, alpha=alpha, weight=shape)


def _loha_tucker(rng: "Random", shape: Shape, rank: int, alpha: float | None, dtype: str) -> LoHa:
    if len(shape) < 4:
        return _loha(rng, shape, rank, alpha, dtype)
    sizes: dict[str, Shape] = {}
    for i in (1, 2):
        sizes |= {f"hada_t{i}": (rank, rank, *shape[2:])}
        sizes |= {f"hada_w{i}_a": (rank, shape[0]), f"hada_w{i}_b": (rank, shape[1])}
    return LoHa(**{n: _normal(rng, s, dtype) for n, s in sizes.items()}, alpha=alpha, weight=shape)


def _lokr(full1: bool, full2: bool, tucker: bool = False) -> Make:
    def make(rng: "Random", shape: Shape, rank: int, alpha: float | None, dtype: str) -> LoKr:
        o1, i1 = _factor(shape[0]), _factor(shape[1])
        o2, i2 = shape[0] // o1, shape[1] // i1
        kernel = shape[2:]
        sizes: dict[str, Shape] = {"lokr_w1": (o1, i1)} if full1 else {"lokr_w1_a": (o1, rank), "lokr_w1_b": (rank, i1)}
        if full2:
            sizes |= {"lokr_w2": (o2, i2, *kernel)}
        elif tucker and kernel:
            sizes |= {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, o2), "lokr_w2_b": (rank, i2)}
        else:
            sizes |= {"lokr_w2_a": (o2, rank), "lokr_w2_b": (rank, i2 * math.prod(kernel))}
        return LoKr(**{n: _normal(rng, s, dtype) for n, s in sizes.items()}, alpha=alpha, weight=shape)

    return make


def _full(rng: "Random", shape: Shape, rank: int, alpha: float | None, dtype: str) -> Full:
    return Full(diff=_normal(rng, shape, dtype), diff_b=_normal(rng, shape[:1], dtype))


def _dora(axis: str) -> Make:
    def make(rng: "Random", shape: Shape, rank: int, alpha: float | None, dtype: str) -> DoRA:
        tail = (1,) * (len(shape) - 2)
        sizes = (shape[0], 1, *tail) if axis == "out" else (1, shape[1], *tail)
        return DoRA(direction=_lora(rng, shape, rank, alpha, dtype), magnitude=_normal(rng, sizes, dtype))

    return make


def _factor(size: int) -> int:
    return next((f for f in (8, 4, 3, 2) if size % f == 0), 1)


KINDS: Mapping[str, Make] = {
    "lora": _lora,
    "tucker": _tucker,
    "loha": _loha,
    "loha-tucker": _loha_tucker,
    "lokr": _lokr(True, False),
    "lokr-full": _lokr(True, True),
    "lokr-w1": _lokr(False, True),
    "lokr-both": _lokr(False, False),
    "lokr-tucker": _lokr(True, False, tucker=True),
    "full": _full,
    "dora": _dora("out"),
    "dora-in": _dora("in"),
}
