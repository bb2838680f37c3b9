"""Several modules as one weight of the model's own code: fused projections and moved rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

from ... import linalg
from ...errors import LayerError, within
from ...layers import BiasOnly, DoRA, Full, Layer, LowRank, Rows
from ...layers.base import in_one_library
from ...tensors import Array, Ranges, Spec, code, concat, float32, namespace, reshape
from ..architectures.names import Parts


class Block(Spec):
    """A shape that depends on values: shared ``down`` or block-diagonal ``up``."""

    __slots__ = ()


def depends(layout: Layer) -> bool:
    """Return whether the rank of a layout depends on values."""
    return isinstance(layout.tensors().get("down"), Block)


def fused(
    parts: Parts,
    layers: Mapping[str, Layer],
    rows_of: Callable[[str], int],
    as_lora: Callable[[Layer], Layer],
) -> Layer:
    """Join the layers of one weight's modules into one layer; a module without a layer is zero.

    Parts with the same ``down`` are stacked without loss of rank, others side by side
    (``up`` block-diagonal, ranks add up).  Kinds that can't be joined become the LoRA with the
    same ΔW, if there is one.

    Args:
        parts: The modules of the weight, with their rows.
        layers: The modules' layers.
        rows_of: Returns the number of rows of a module's weight.
        as_lora: Returns the LoRA with the same ΔW.

    Raises:
        LayerError: The layers' kinds can't be joined.
    """
    if len(parts) == 1:
        layer = layers[parts[0].module]
        if parts[0].rows is None:
            return layer
        with within(parts[0].module):
            return _moved(layer, parts[0].rows, as_lora)
    in_one = dict(zip(layers, in_one_library([*layers.values()]), strict=True))
    by_part = [in_one.get(part.module) for part in parts]
    present = [layer for layer in by_part if layer is not None]
    if whole := _same_whole(parts, present):
        return whole
    rows = [rows_of(part.module) for part in parts]
    if all(layer.bias_only for layer in present):
        return BiasOnly(diff_b=_fused_bias(by_part, rows))
    if any(layer.dense for layer in present) and all(layer.dense or _is_summed(layer) for layer in present):
        return _fused_full(by_part, rows)
    if all(_is_summed(layer) for layer in present):
        return _fused_low_rank([None if layer is None else _low_rank(layer, as_lora) for layer in by_part], rows)
    if len(present) == len(parts) and all(isinstance(layer, DoRA) and layer.axis == "out" for layer in present):
        return _fused_dora(parts, present, rows_of, as_lora)
    kinds = ", ".join(sorted({layer.kind for layer in present}))
    raise LayerError(
        f"{', '.join(part.module for part in parts)} are one weight here, and parts of it that are stored as {kinds} "
        "can't be joined. Ways out: a dialect with diffusers' names, or leave the modules out (exclude)"
    )


def _is_summed(layer: Layer) -> bool:
    """True if the layer is a LoRA, or has one with the same ΔW, or changes a bias only."""
    return layer.factored or layer.bias_only


def _fused_full(layers: list[Layer | None], rows: list[int]) -> Full:
    """Stack whole differences; layers with factors become whole differences first."""
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
    """Reorder the rows of a layer that has other places in the weight: halves that are exchanged."""
    rows = _of_width(rows, layer.shape[0])
    if isinstance(layer, Rows) and layer.ranges == rows:
        return layer.whole
    starts = [sum(stop - start for start, stop in rows[:i]) for i in range(len(rows))]
    back = sorted(range(len(rows)), key=lambda i: rows[i][0])
    order = tuple((starts[i], starts[i] + rows[i][1] - rows[i][0]) for i in back)
    return (as_lora(layer) if layer.factored and layer.kind != "lora" else layer).rows(order, None)


def _of_width(rows: Ranges, width: int) -> Ranges:
    """Scale rows to a model with widths of its own."""
    own = sum(stop - start for start, stop in rows)
    if any(n * width % own for pair in rows for n in pair):
        raise LayerError(f"its {width} rows can't be exchanged as the {own} of the model are: they don't divide evenly")
    return tuple((start * width // own, stop * width // own) for start, stop in rows)


def _same_whole(parts: Parts, layers: list[Layer]) -> Layer | None:
    """Return the layer that was cut into these very parts, if there is one."""
    if len(layers) != len(parts) or not all(isinstance(layer, Rows) for layer in layers):
        return None
    cuts = [layer for layer in layers if isinstance(layer, Rows)]
    same = len({cut.source for cut in cuts}) == 1 and [cut.ranges for cut in cuts] == [part.rows for part in parts]
    return cuts[0].whole if same else None


def _fused_low_rank(by_part: list[Layer | None], rows: list[int]) -> LowRank:
    """Join LoRAs and biases: under one ``down`` if all have the same, else block-diagonally."""
    by_part = _of_one_sort(by_part)
    bias = _fused_bias(by_part, rows)
    loras = [layer if isinstance(layer, LowRank) else None for layer in by_part]
    present = [lora for lora in loras if lora is not None]
    shared = _share_down(present)
    if len({lora.scale for lora in present}) > 1:
        loras = [lora and _unscaled(lora) for lora in loras]
        present = [lora for lora in loras if lora is not None]
    first = present[0]
    if shared is None:
        rank = sum(lora.rank for lora in present)
        return LowRank(
            up=Block((sum(rows), rank), code(first.up)),
            down=Block((rank, *first.down.shape[1:]), code(first.down)),
            diff_b=bias,
        )
    if shared:
        ups = [
            _zeros((n, first.rank), first.up) if lora is None else lora.up for lora, n in zip(loras, rows, strict=True)
        ]
        down, up, down_id = first.down, _concat(ups), first.down_id
    else:
        down, up, down_id = _concat([lora.down for lora in present]), _block_diagonal(loras, rows), None
    alpha = None if first.alpha is None else first.scale * down.shape[0]
    return LowRank(up=up, down=down, alpha=alpha, down_id=down_id, diff_b=bias)


def _of_one_sort(layers: list[Layer | None]) -> list[Layer | None]:
    """Return layouts of all layers if one is a layout: a plan has them beside layers that stay as they are in memory."""
    tensors = [tensor for layer in layers if layer is not None for tensor in layer.tensors().values()]
    if not any(isinstance(tensor, Spec) for tensor in tensors):
        return layers
    return [None if layer is None else replace(layer, **_specs(layer)) for layer in layers]


def _specs(layer: Layer) -> dict[str, Spec]:
    arrays = {f.name: v for f in fields(layer) if hasattr(v := getattr(layer, f.name), "dtype")}
    return {name: v if isinstance(v, Spec) else Spec(tuple(v.shape), code(v)) for name, v in arrays.items()}


def _fused_bias(layers: Sequence[Layer | None], rows: list[int]) -> Array | Spec | None:
    """Stack the differences of the bias, with zeros for parts that have none; None if no part has one."""
    biases = [None if layer is None else layer.delta_bias() for layer in layers]
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    return _concat([_zeros((n,), like) if bias is None else bias for bias, n in zip(biases, rows, strict=True)])


def _share_down(layers: list[LowRank]) -> bool | None:
    """Return whether all have the same ``down``; None for layouts, if only values could tell."""
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


def with_zero_bias(layer: Layer) -> Layer:
    """Return a LoRA with a difference of the bias that is zero; any other layer as it is."""
    return replace(layer, diff_b=_zeros((layer.shape[0],), layer.up)) if isinstance(layer, LowRank) else layer


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
    present = [layer for layer in layers if layer is not None]
    same = len({code(layer.up) for layer in present}) == 1
    if isinstance(present[0].up, Spec):
        return Spec((sum(rows), sum(layer.rank for layer in present)), code(present[0].up) if same else "F32")
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
    """Drop the columns of ``up`` that are zero in a part of a fused weight.

    This takes a block-diagonal join apart again, into the ranks that it was made of.
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
