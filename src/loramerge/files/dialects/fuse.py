"""Several modules as one weight of the model's own code: fused projections and moved rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ... import linalg
from ...errors import LayerError
from ...layers import BiasOnly, DoRA, Full, Layer, LowRank, Rows
from ...tensors import Array, Ranges, Spec, code, concat, float32, namespace, reshape
from ..architectures.names import Parts


class Block(Spec):
    """A shape that depends on values: shared ``down`` or block-diagonal ``up``."""

    __slots__ = ()


def fused(
    parts: Parts,
    layers: Mapping[str, Layer],
    rows_of: Callable[[str], int],
    as_lora: Callable[[Layer], Layer],
) -> Layer:
    """One layer of the modules of one weight; a module without a layer is zero.

    Parts with the same ``down`` are stacked without loss of rank, others side by side
    (``up`` block-diagonal, ranks add up).  Kinds that can't be joined become the LoRA with the
    same ΔW, where there is one.

    Args:
        parts: The modules of the weight, with their rows.
        layers: The modules' layers.
        rows_of: Number of rows of a module's weight.
        as_lora: Gives the LoRA with the same ΔW.
    """
    if len(parts) == 1:
        layer = layers[parts[0].module]
        return layer if parts[0].rows is None else _moved(layer, parts[0].rows, as_lora)
    given = [layers.get(part.module) for part in parts]
    found = [layer for layer in given if layer is not None]
    if whole := _same_whole(parts, found):
        return whole
    rows = [rows_of(part.module) for part in parts]
    if all(layer.bias_only for layer in found):
        return BiasOnly(diff_b=_fused_bias(given, rows))
    if any(layer.dense for layer in found) and all(layer.dense or _is_summed(layer) for layer in found):
        return _fused_full(given, rows)
    if all(_is_summed(layer) for layer in found):
        return _fused_low_rank([None if layer is None else _low_rank(layer, as_lora) for layer in given], rows)
    if len(found) == len(parts) and all(isinstance(layer, DoRA) and layer.axis == "out" for layer in found):
        return _fused_dora(parts, found, rows_of, as_lora)
    kinds = ", ".join(sorted({layer.kind for layer in found}))
    raise LayerError(
        f"{', '.join(part.module for part in parts)} are one weight here, and parts of it that are stored as {kinds} "
        "can't be joined. Ways out: a dialect with diffusers' names, or leave the modules out (exclude)"
    )


def _is_summed(layer: Layer) -> bool:
    """True if the layer is a LoRA, or has one with the same ΔW, or changes a bias only."""
    return layer.factored or layer.bias_only


def _fused_full(layers: list[Layer | None], rows: list[int]) -> Full:
    """Whole differences one below the other; what has factors becomes one too."""
    columns = next(layer.shape[1:] for layer in layers if layer is not None and not layer.bias_only)
    like = next(layer.diff for layer in layers if isinstance(layer, Full))
    deltas = [_delta(layer, (n, *columns), like) for layer, n in zip(layers, rows, strict=True)]
    return Full(diff=_concat(deltas), diff_b=_fused_bias(layers, rows))


def _delta(layer: Layer | None, shape: tuple[int, ...], like: Array | Spec) -> Array | Spec:
    if layer is None or layer.bias_only:
        return _zeros(shape, like)
    if isinstance(layer, Full):
        return layer.diff
    return Spec(shape, "F32") if isinstance(like, Spec) else layer.delta()


def _low_rank(layer: Layer, as_lora: Callable[[Layer], Layer]) -> Layer:
    if layer.bias_only:
        return layer
    lora = layer if isinstance(layer, LowRank) else as_lora(layer)
    assert isinstance(lora, LowRank)
    return lora.without_core()


def _moved(layer: Layer, rows: Ranges, as_lora: Callable[[Layer], Layer]) -> Layer:
    """A layer whose rows stand elsewhere in the weight: halves exchanged."""
    if isinstance(layer, Rows) and layer.ranges == rows:
        return layer.whole
    starts = [sum(stop - start for start, stop in rows[:i]) for i in range(len(rows))]
    back = sorted(range(len(rows)), key=lambda i: rows[i][0])
    order = tuple((starts[i], starts[i] + rows[i][1] - rows[i][0]) for i in back)
    return (as_lora(layer) if layer.factored and layer.kind != "lora" else layer).rows(order, None)


def _same_whole(parts: Parts, layers: list[Layer]) -> Layer | None:
    """The layer that was cut into these very parts."""
    if len(layers) != len(parts) or not all(isinstance(layer, Rows) for layer in layers):
        return None
    cuts = [layer for layer in layers if isinstance(layer, Rows)]
    same = len({cut.source for cut in cuts}) == 1 and [cut.ranges for cut in cuts] == [part.rows for part in parts]
    return cuts[0].whole if same else None


def _fused_low_rank(given: list[Layer | None], rows: list[int]) -> LowRank:
    bias = _fused_bias(given, rows)
    layers = [layer if isinstance(layer, LowRank) else None for layer in given]
    found = [layer for layer in layers if layer is not None]
    shared = _share_down(found)
    if len({layer.scale for layer in found}) > 1:
        layers = [layer and _unscaled(layer) for layer in layers]
        found = [layer for layer in layers if layer is not None]
    scale = found[0].scale
    first = found[0].down
    if shared is None:
        rank = sum(layer.rank for layer in found)
        return LowRank(
            up=Block((sum(rows), rank), code(found[0].up)),
            down=Block((rank, *first.shape[1:]), code(first)),
            diff_b=bias,
        )
    if shared:
        down, up, ids = (
            first,
            _concat([_up(layer, n, found[0]) for layer, n in zip(layers, rows, strict=True)]),
            found[0].down_id,
        )
    else:
        down, up, ids = _concat([layer.down for layer in found]), _block_diagonal(layers, rows), None
    alpha = None if found[0].alpha is None else scale * down.shape[0]
    return LowRank(up=up, down=down, alpha=alpha, down_id=ids, diff_b=bias)


def _fused_bias(layers: Sequence[Layer | None], rows: list[int]) -> Array | Spec | None:
    """The differences of the bias, one below the other; zero where a part has none."""
    given = [None if layer is None else layer.delta_bias() for layer in layers]
    like = next((bias for bias in given if bias is not None), None)
    if like is None:
        return None
    return _concat([_zeros((n,), like) if bias is None else bias for bias, n in zip(given, rows, strict=True)])


def _share_down(layers: list[LowRank]) -> bool | None:
    """Whether all have the same ``down``; None when only values could tell."""
    first = layers[0]
    if all(layer.down_id is not None and layer.down_id == first.down_id for layer in layers):
        return True
    if any(layer.down.shape != first.down.shape or code(layer.down) != code(first.down) for layer in layers):
        return False
    if isinstance(first.down, Spec):
        return None
    return all(bool((layer.down == first.down).all()) for layer in layers[1:])


def _unscaled(layer: LowRank) -> LowRank:
    up = Spec(layer.up.shape, "F32") if isinstance(layer.up, Spec) else float32(layer.up) * layer.scale
    return replace(layer, up=up, alpha=None)


def _up(layer: LowRank | None, rows: int, like: LowRank) -> Array | Spec:
    if layer is not None:
        return layer.up
    return _zeros((rows, like.rank), like.up)


def _zeros(shape: tuple[int, ...], like: Array | Spec) -> Array | Spec:
    if isinstance(like, Spec):
        return Spec(shape, like.dtype)
    return namespace(like).zeros(shape, dtype=like.dtype, device=like.device)


def _concat(tensors: list[Array | Spec]) -> Array | Spec:
    first = tensors[0]
    if isinstance(first, Spec):
        dtype = first.dtype if len({code(t) for t in tensors}) == 1 else "F32"
        return Spec((sum(t.shape[0] for t in tensors), *first.shape[1:]), dtype)
    return concat(tensors)


def _block_diagonal(layers: list[LowRank | None], rows: list[int]) -> Array | Spec:
    found = [layer for layer in layers if layer is not None]
    total = sum(layer.rank for layer in found)
    if isinstance(found[0].up, Spec):
        dtype = code(found[0].up) if len({code(layer.up) for layer in found}) == 1 else "F32"
        return Spec((sum(rows), total), dtype)
    same = len({code(layer.up) for layer in found}) == 1
    ups = [layer and (layer.up if same else float32(layer.up)) for layer in layers]
    like = next(up for up in ups if up is not None)
    return linalg.block_diagonal([_zeros((n, 0), like) if up is None else up for up, n in zip(ups, rows, strict=True)])


def _fused_dora(
    parts: Parts, layers: list[Layer], rows_of: Callable[[str], int], as_lora: Callable[[Layer], Layer]
) -> DoRA:
    doras = [layer for layer in layers if isinstance(layer, DoRA)]
    directions = {part.module: dora.direction for part, dora in zip(parts, doras, strict=True)}
    magnitudes = [_column(dora) for dora in doras]
    return DoRA(direction=fused(parts, directions, rows_of, as_lora), magnitude=_concat(magnitudes))


def _column(dora: DoRA) -> Array | Spec:
    return reshape(dora.magnitude, (dora.shape[0], 1))


def compacted(layer: LowRank) -> LowRank:
    """A part of a fused weight without the columns of ``up`` that are zero in it.

    What was joined block-diagonally comes apart into the ranks that it was made of.
    """
    if not (isinstance(layer.down_id, tuple) and layer.down_id[:1] == ("rows of",)):
        return layer
    if isinstance(layer.up, Spec):
        return replace(layer, up=Spec(layer.up.shape, code(layer.up)), down=Block(layer.down.shape, code(layer.down)))
    up: Array = layer.up
    down: Array = layer.down
    used = (up != 0).any(0)
    keep = [i for i in range(layer.rank) if bool(used[i])] or [0]
    if len(keep) == layer.rank:
        return layer
    alpha = layer.scale * len(keep)
    return replace(layer, up=up[:, keep], down=down[keep], alpha=None if alpha == len(keep) else alpha)
