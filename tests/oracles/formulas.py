"""Layers and merge methods as their papers define them: dense matrices in float64, and nothing of loramerge's."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Deltas = Sequence[Array]
Weights = Sequence[float]

FAINT = 1e-6
"""Directions below this share of the largest aren't counted as part of a span: float32 holds no more."""

gaps: list[float] = []
"""Relative distances between the last entry that a method took and the first that it left, or of a sum to zero."""


def wide(array: Any) -> Array:
    return np.asarray(array, dtype=np.float64)


def delta(kind: str, tensors: Mapping[str, Any], alpha: float | None, shape: tuple[int, ...]) -> Array:
    """ΔW of a layer, ``(out, in·kh·kw)``, from the tensors of its file."""
    t = {name: wide(tensor) for name, tensor in tensors.items()}
    found = PARTS[kind.partition("-")[0]](t)
    rank = next((t[name].shape[0] for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in t), None)
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    return (scale * found).reshape(shape[0], -1)


def low_rank(t: Mapping[str, Array]) -> Array:
    up, down = t["up"].reshape(len(t["up"]), -1), t["down"].reshape(len(t["down"]), -1)
    return up @ down if "mid" not in t else np.einsum("or,rshw,si->oihw", up, t["mid"], down)


def hadamard(t: Mapping[str, Array]) -> Array:
    halves = []
    for i in "12":
        a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
        halves.append(a @ b if f"hada_t{i}" not in t else np.einsum("ro,rshw,si->oihw", a, t[f"hada_t{i}"], b))
    return halves[0] * halves[1]


def kronecker(t: Mapping[str, Array]) -> Array:
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = np.einsum("ro,rshw,si->oihw", t["lokr_w2_a"], t["lokr_t2"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    return np.kron(w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2)), w2)


PARTS: Mapping[str, Callable[[Mapping[str, Array]], Array]] = {
    "lora": low_rank,
    "tucker": low_rank,
    "loha": hadamard,
    "lokr": kronecker,
    "full": lambda t: t["diff"],
}


def dora(direction: Array, magnitude: Any, weight: Array, axis: int) -> Array:
    """W' − W with W' = m · (W + ΔV) / ‖W + ΔV‖; the weight may have a kernel, whose norm runs over it, too."""
    patched = weight + direction.reshape(weight.shape)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    norms = np.sqrt((patched**2).sum(axis=others, keepdims=True))
    return (wide(magnitude).reshape(norms.shape) * patched / norms - weight).reshape(len(weight), -1)


def svd(matrix: Array, size: float = 0.0) -> tuple[Array, Array, Array]:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    k = int((s > FAINT * max(s[0], size)).sum()) if len(s) else 0
    return u[:, :k], s[:k], vt[:k]


def polar(matrix: Array) -> Array:
    u, _, vt = svd(matrix)
    return u @ vt


def total(deltas: Deltas, weights: Weights) -> Array:
    return sum((w * d for w, d in zip(weights, deltas, strict=True)), np.zeros_like(deltas[0]))


def top(matrix: Array, count: int) -> Array:
    """A mask of the entries with the largest magnitudes."""
    order = np.sort(np.abs(matrix), axis=None)[::-1]
    if count < len(order):
        gaps.append((order[count - 1] - order[count]) / order[0])
    return np.abs(matrix) >= order[count - 1]


def count(size: int, share: float) -> int:
    return max(1, int(share * size))


def elected(parts: Deltas, weights: Weights) -> Array:
    """TIES, steps 2 and 3: an entry's sign is that of the sum, and its value the mean of those that have it."""
    terms = np.stack([w * p for w, p in zip(weights, parts, strict=True)])
    votes = terms.sum(0)
    gaps.append(np.abs(votes[(terms != 0).sum(0) > 1]).min(initial=1.0) / np.abs(terms).max())
    agrees = np.where(votes >= 0, terms > 0, terms < 0)
    mass = np.abs(np.asarray(weights))[:, None, None] * agrees
    return sum(map(abs, weights)) * (terms * agrees).sum(0) / np.where(mass.sum(0) > 0, mass.sum(0), 1)


CONSENSUS = {"linear": total, "ties": elected}


def drawn(shape: tuple[int, ...], module: str, seed: int, place: int) -> Array:
    """The numbers of LoRA ``place`` in a module, float32 as they are drawn."""
    stream = np.random.default_rng([(seed << 32) | zlib.crc32(module.encode()), place])
    return stream.random(shape, dtype=np.float32)


def ties(deltas: Deltas, weights: Weights, *, density: float, **_: Any) -> Array:
    return elected([d * top(d, count(d.size, density)) for d in deltas], weights)


def magnitude_prune(deltas: Deltas, weights: Weights, *, density: float, **_: Any) -> Array:
    return total([d * top(d, count(d.size, density)) for d in deltas], weights)


def dare(
    deltas: Deltas, weights: Weights, *, density: float, consensus: str = "linear", module: str, seed: int, **_: Any
) -> Array:
    masks = [drawn(d.shape, module, seed, i) < density for i, d in enumerate(deltas)]
    return CONSENSUS[consensus]([m * d / density for m, d in zip(masks, deltas, strict=True)], weights)


def della(
    deltas: Deltas,
    weights: Weights,
    *,
    density: float,
    epsilon: float,
    consensus: str,
    module: str,
    seed: int,
    **_: Any,
) -> Array:
    kept = []
    for i, d in enumerate(deltas):
        places = np.abs(d).argsort(axis=1).argsort(axis=1) / max(1, d.shape[1] - 1)
        chances = density - epsilon + 2 * epsilon * places
        numbers = drawn(d.shape, module, seed, i)
        gaps.append(np.abs(numbers - chances).min())
        gaps.append(10 * np.diff(np.sort(np.abs(d), axis=1)).min(initial=1.0) / np.abs(d).max())
        kept.append(d * (numbers < chances) / chances)
    return CONSENSUS[consensus](kept, weights)


def breadcrumbs(deltas: Deltas, weights: Weights, *, density: float, gamma: float, consensus: str, **_: Any) -> Array:
    kept = []
    for d in deltas:
        inner = count(d.size, density)
        outer = min(int(gamma * d.size), d.size - inner)
        dropped = top(d, outer) if outer else np.zeros(d.shape, bool)
        kept.append(d * (top(d, outer + inner) & ~dropped))
    return CONSENSUS[consensus](kept, weights)


def sce(deltas: Deltas, weights: Weights, *, density: float, **_: Any) -> Array:
    terms = np.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    chosen = top(terms.var(axis=0), count(terms[0].size, density)) if density < 1 else np.ones_like(terms[0])
    terms = terms * chosen
    shares = [abs(w) * ((d * chosen) ** 2).sum() for w, d in zip(weights, deltas, strict=True)]
    votes = terms.sum(0)
    gaps.append(np.abs(votes[chosen > 0]).min(initial=1.0) / np.abs(terms).max())
    agrees = np.where(votes >= 0, terms > 0, terms < 0)
    signed = np.stack([np.sign(w) * d * chosen for w, d in zip(weights, deltas, strict=True)])
    mass = np.asarray(shares)[:, None, None] * agrees
    return sum(map(abs, weights)) * (mass * signed).sum(0) / np.where(mass.sum(0) > 0, mass.sum(0), 1)


def knots(deltas: Deltas, weights: Weights, *, inside: str, density: float, **options: Any) -> Array:
    u, s, vt = svd(np.concatenate(deltas, axis=1))
    parts = np.split(s[:, None] * vt, len(deltas), axis=1)
    merge = {"ties": ties, "dare": dare, "linear": lambda p, w, **_: total(p, w)}[inside]
    merged: Array = merge(parts, weights, density=density, **options)
    return u @ merged


def spaces(deltas: Deltas) -> tuple[Array, Array]:
    """Orthonormal bases of the columns and of the rows of all LoRAs."""
    parts = [svd(d) for d in deltas]
    left = svd(np.concatenate([u * np.sqrt(s) for u, s, _ in parts], axis=1))[0]
    return left, svd(np.concatenate([np.sqrt(s)[:, None] * vt for _, s, vt in parts], axis=0))[2]


def tsv(deltas: Deltas, weights: Weights, **_: Any) -> Array:
    parts = [svd(d) for d in deltas]
    s = np.concatenate([w * s for w, (_, s, _) in zip(weights, parts, strict=True)])
    return polar(np.concatenate([u for u, _, _ in parts], 1)) * s @ polar(np.concatenate([vt for _, _, vt in parts], 0))


def size(deltas: Deltas, weights: Weights) -> float:
    return sum(abs(w) * float(np.linalg.norm(d, 2)) for w, d in zip(weights, deltas, strict=True)) / 10


def iso_c(deltas: Deltas, weights: Weights, **_: Any) -> Array:
    u, s, vt = svd(total(deltas, weights), size(deltas, weights))
    return s.mean() * u @ vt


def iso_cts(deltas: Deltas, weights: Weights, *, common: float, **_: Any) -> Array:
    u, s, vt = svd(total(deltas, weights), size(deltas, weights))
    r, n = len(s), len(weights)
    own = min(round((r - int(common * r)) / n), (r - 1) // n)
    lefts, values, rights = ([x[: r - n * own]] for x in (u.T, s, vt))
    for w, d in zip(weights, deltas, strict=True):
        rest = w * d - lefts[0].T @ (lefts[0] @ (w * d))
        a, b, c = svd(rest, abs(w) * float(np.linalg.norm(d, 2)))
        lefts.append(a.T[:own])
        values.append(b[:own])
        rights.append(c[:own])
    return np.concatenate(values).mean() * polar(np.concatenate(lefts).T) @ polar(np.concatenate(rights))


def cart(deltas: Deltas, weights: Weights, *, share: float, scale: float, **_: Any) -> Array:
    mass = math.fsum(weights)
    mean = total(deltas, weights) / mass
    left, right = spaces(deltas)
    k = max(1, math.ceil(share * min(left.shape[1], right.shape[0])))
    found = mean
    for w, d in zip(weights, deltas, strict=True):
        u, s, vt = np.linalg.svd(d - mean, full_matrices=False)
        found = found + scale * len(weights) * w / mass * (u[:, :k] * s[:k]) @ vt[:k]
    return mass * found


def np_lora(deltas: Deltas, weights: Weights, *, mu: float, order: str, **_: Any) -> Array:
    damping = 1.0 if math.isinf(mu) else mu / (1 + mu)
    found = np.zeros_like(deltas[0])
    for i, (w, d) in enumerate(zip(weights, deltas, strict=True)):
        others = [x for j, x in enumerate(deltas) if j < i or (j > i and order == "none")]
        rows = svd(np.concatenate([svd(x)[2] for x in others]))[2] if others else d[:0]
        found = found + w * (d - damping * d @ rows.T @ rows)
    return found


def wudi(deltas: Deltas, weights: Weights, *, ridge: float, **_: Any) -> Array:
    """The normal equations' least-squares problem itself, of whole ΔWs."""
    own = [len(deltas) * w * d for w, d in zip(weights, deltas, strict=True)]
    sizes = [np.linalg.norm(d) for d in own]
    root = math.sqrt(ridge)
    equations = [d / n for d, n in zip(own, sizes, strict=True)] + [root * np.eye(own[0].shape[1])]
    answers = [d @ d.T / n for d, n in zip(own, sizes, strict=True)] + [root * np.mean(own, axis=0).T]
    return np.linalg.lstsq(np.concatenate(equations), np.concatenate(answers), rcond=None)[0].T


def magmax(deltas: Deltas, weights: Weights, **_: Any) -> Array:
    terms = np.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    sizes = np.sort(np.abs(terms), axis=0)
    gaps.append((sizes[-1] - sizes[-2]).min() / sizes.max())
    signed = np.stack([math.copysign(1, w) * d for w, d in zip(weights, deltas, strict=True)])
    chosen = np.abs(terms).argmax(axis=0)
    return sum(map(abs, weights)) * np.take_along_axis(signed, chosen[None], axis=0)[0]


def subtract(deltas: Deltas, weights: Weights, **_: Any) -> Array:
    found = weights[0] * deltas[0]
    for w, d in zip(weights[1:], deltas[1:], strict=True):
        u, _, vt = svd(d)
        found = found - w * u @ (u.T @ found @ vt.T) @ vt
    return found


def slerp(deltas: Deltas, weights: Weights, **_: Any) -> Array:
    a, b = deltas
    mass = sum(weights)
    t = weights[1] / mass
    cosine = float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    if cosine >= 0.9995:
        return total(deltas, weights)
    angle = math.acos(cosine)
    return mass * (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def karcher(deltas: Deltas, weights: Weights, **_: Any) -> Array:
    """The point of the sphere where the weighted logarithms of all directions cancel."""
    points = [d / np.linalg.norm(d) for d in deltas]
    shares = np.asarray(weights) / sum(weights)
    mean = total(points, shares)
    mean = mean / np.linalg.norm(mean)
    for _ in range(500):
        step = np.zeros_like(mean)
        for w, p in zip(shares, points, strict=True):
            cosine = float(np.clip((mean * p).sum(), -1, 1))
            across = p - cosine * mean
            if np.linalg.norm(across) > 1e-15:
                step += w * math.acos(cosine) * across / np.linalg.norm(across)
        length = float(np.linalg.norm(step))
        if length < 1e-14:
            break
        mean = math.cos(length) * mean + math.sin(length) * step / length
    return float(sum(w * np.linalg.norm(d) for w, d in zip(weights, deltas, strict=True))) * mean


def model_stock(deltas: Deltas, weights: Weights, **_: Any) -> Array:
    n = len(deltas)
    units = [d / np.linalg.norm(d) for d in deltas]
    cosine = float(np.mean([(units[i] * units[j]).sum() for i in range(n) for j in range(i)]))
    return n * cosine / (1 + (n - 1) * cosine) * total(deltas, weights)


METHODS: Mapping[str, Callable[..., Array]] = {
    "linear": lambda deltas, weights, **_: total(deltas, weights),
    "ties": ties,
    "dare": dare,
    "magnitude_prune": magnitude_prune,
    "della": della,
    "breadcrumbs": breadcrumbs,
    "sce": sce,
    "knots": knots,
    "tsv": tsv,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "cart": cart,
    "slerp": slerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "np_lora": np_lora,
    "wudi": wudi,
    "magmax": magmax,
    "subtract": subtract,
}


def in_core(merge: Callable[..., Array], deltas: Deltas, weights: Weights, **options: Any) -> Array:
    """A method on entries in the common space of all LoRAs."""
    left, right = spaces(deltas)
    found: Array = left @ merge([left.T @ d @ right.T for d in deltas], weights, **options) @ right
    return found


def factor_average(factors: Sequence[tuple[Array, Array, float]], weights: Weights) -> Array:
    """PEFT's sum of factors, of ``up``, ``down`` and the scale of each LoRA."""
    up = sum(math.sqrt(abs(w * s)) * u for w, (u, _, s) in zip(weights, factors, strict=True))
    down = sum(math.copysign(math.sqrt(abs(w * s)), w * s) * d for w, (_, d, s) in zip(weights, factors, strict=True))
    found: Array = wide(up) @ wide(down)
    return found
