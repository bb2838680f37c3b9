"""Tensors as files and layers see them: a shape, a dtype, and values that may not have been read yet.

A dtype is named by its safetensors code: ``"F32"``, ``"F16"``, ``"BF16"`` ….  Arrays are
numpy's, or torch's where the caller brought those; the code above this file uses the array API
standard, which both follow.
"""

import math
import struct
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from .errors import NumberError, OptionError, needed

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool as Bool, Float as Float, Float32 as Float32, Float64 as Float64
else:
    # ``Float[Array, "out r"]`` is a note for readers: only our tests, see tests/conftest.py, replace these names by
    # jaxtyping's and check the shapes of every call.
    Bool = Float = Float32 = Float64 = Annotated

Array: TypeAlias = Any
"""A numpy array or a torch tensor."""

Shape: TypeAlias = tuple[int, ...]
Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Row ranges ``(start, stop)`` of a weight, in order."""

NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
CODES = {name: code for code, name in NAMES.items()}
SIZES = {
    code: 1 if code in ("BOOL", "F8_E4M3", "F8_E5M2") else int("".join(c for c in code if c.isdigit())) // 8
    for code in NAMES
}
ALIASES = {"fp64": "F64", "fp32": "F32", "float": "F32", "fp16": "F16", "half": "F16", "bf16": "BF16"}
BLOCK = 1 << 16
"""Values in a block of rows: in float64, with a few temporary arrays of them, they stay in the processor's cache."""
FLOATS = ("F8_E5M2", "F8_E4M3", "F16", "BF16", "F32", "F64")
"""From narrow to wide; float16 and bfloat16 are widened together to float32."""


class Spec:
    """A tensor whose shape and dtype are known, and whose values are not."""

    __slots__ = ("dtype", "shape")

    shape: Shape
    dtype: str

    def __init__(self, shape: Shape, dtype: str) -> None:
        self.shape = shape
        self.dtype = dtype

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape}, {self.dtype!r})"


class Stored(Spec):
    """A tensor whose values stay in a file until `read` is called."""

    __slots__ = ("begin", "end", "source")

    source: Callable[[int, int], bytes]
    begin: int
    end: int

    def __init__(self, shape: Shape, dtype: str, begin: int, end: int, source: Callable[[int, int], bytes]) -> None:
        self.shape = shape
        self.dtype = dtype
        self.source = source
        self.begin = begin
        self.end = end

    def raw(self) -> bytes:
        """Read the tensor's bytes."""
        return self.source(self.begin, self.end)

    def read(self) -> Array:
        """Read the values into an array of the stored dtype."""
        import numpy as np

        return np.frombuffer(self.raw(), numpy_dtype(self.dtype)).reshape(self.shape)


class Held(Spec):
    """A tensor that is in memory, numpy's or torch's."""

    __slots__ = ("array",)

    array: Array

    def __init__(self, array: Array) -> None:
        super().__init__(tuple(array.shape), code(array))
        self.array = array

    def read(self) -> Array:
        """Return the array."""
        return self.array


Tensor: TypeAlias = Stored | Held


def scalar(tensor: Tensor) -> float:
    """Return the value of a tensor of one element, without numpy."""
    if isinstance(tensor, Held):
        return float(tensor.array.reshape(()))
    data = tensor.raw()
    if tensor.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if tensor.dtype in STRUCT:
        return float(struct.unpack("<" + STRUCT[tensor.dtype], data)[0])
    return float(tensor.read().reshape(())[()])


STRUCT = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}


def code(tensor: Array | Spec) -> str:
    """Return the safetensors code of a tensor's dtype."""
    if isinstance(tensor, Spec):
        return tensor.dtype
    return _code(tensor.dtype)


def is_known(array: Array) -> bool:
    """Return whether an array's dtype has a code; complex numbers and objects have none."""
    return str(array.dtype).removeprefix("torch.") in CODES


@cache
def _code(dtype: Any) -> str:
    return CODES[str(dtype).removeprefix("torch.")]


def parse_dtype(name: str) -> str:
    """Return the code of a dtype as people write it: ``fp16``, ``float16``, ``torch.float16``, ``F16``."""
    plain = str(name).removeprefix("torch.")
    found = CODES.get(plain.lower()) or ALIASES.get(plain.lower()) or plain.upper()
    if found not in FLOATS:
        raise OptionError(f"Unknown dtype {name!r}. Available: float32, float16, bfloat16, float64.")
    return found


def written_dtype(name: str) -> str:
    """Return the code of a dtype that a LoRA is written in, as `parse_dtype`.

    Raises:
        OptionError: It is unknown, or a float8: factors have values that it rounds by percents, or to zero.
    """
    found = parse_dtype(name)
    if found.startswith("F8"):
        raise OptionError(
            f"LoRAs aren't written in {NAMES[found]}, which rounds small values to 0. Ways out: float16, bfloat16 or float32; "
            "a float8 file that is only renamed or converted keeps its values without a dtype."
        )
    return found


def widest(codes: Sequence[str]) -> str:
    """Return the narrowest float dtype that holds every value of the given ones."""
    return _widest(frozenset(codes))


def computed(codes: Sequence[str]) -> str:
    """Return the dtype for results computed from the given ones: theirs, but at least 16 bits.

    Sums and factors of float8 values, rounded to float8 again, would be wrong by some percent.
    """
    found = widest(codes)
    return "F16" if found.startswith("F8") else found


@cache
def _widest(codes: frozenset[str]) -> str:
    floats = {c if c in FLOATS else "F32" for c in codes}
    if {"F16", "BF16"} <= floats:
        floats.add("F32")
    if {"F8_E5M2", "F8_E4M3"} <= floats:
        floats.add("F16")
    return max(floats, key=FLOATS.index)


@cache
def numpy_dtype(dtype: str) -> "np.dtype[Any]":
    """Return numpy's dtype for a code; bfloat16 and float8 come from ml_dtypes."""
    import numpy as np

    if dtype in ("BF16", "F8_E4M3", "F8_E5M2"):
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, NAMES[dtype]))
        return found
    return np.dtype(NAMES[dtype])


def is_torch(array: Array) -> bool:
    """Return whether an array is a torch tensor, without importing torch."""
    return type(array).__module__.startswith("torch")


def namespace(array: Array) -> Any:
    """Return the array API namespace of an array: numpy itself, or torch wrapped by array-api-compat."""
    if is_torch(array):
        with needed("Computing with torch"):
            import array_api_compat.torch

        return array_api_compat.torch
    return array.__array_namespace__()


def nbytes(shape: Shape, dtype: str) -> int:
    """Return how many bytes a tensor takes in a file."""
    return math.prod(shape) * SIZES[dtype]


def float32(array: Array) -> Array:
    """Convert to float32.

    Raises:
        NumberError: Numbers of float64 are too large or too small for it.
    """
    _in_range(array)
    if is_torch(array):
        return array.float()
    import numpy as np

    return _half_to_float(array) if array.dtype == np.float16 else array.astype(np.float32, copy=False)


def float64(array: Array) -> Array:
    """Convert to float64, within the range of float32; the errors are those of `float32`."""
    _in_range(array)
    xp = namespace(array)
    return array if code(array) == "F64" else xp.astype(float32(array), xp.float64)


def _in_range(array: Array) -> None:
    if code(array) == "F64" and math.prod(array.shape):
        check_float32(largest_of(array))


def _in_blocks(function: Callable[[Array], Array], array: Array, dtype: Any) -> Array:
    """Apply a function to the values of an array of numpy, a block at a time: its temporary arrays stay in the cache."""
    import numpy as np

    if array.size <= BLOCK:
        return function(array)
    found, flat = np.empty(array.shape, dtype), array.reshape(-1)
    values = found.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        values[start : start + BLOCK] = function(flat[start : start + BLOCK])
    return found


def _half_to_float(array: Array) -> Array:
    """Move bits from float16 to float32, exact for finite values; numpy's cast takes 1.9 (σ = 0.02) to 4 times as long (2e-4)."""
    import numpy as np

    bits = array.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70002000)
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    return wide


def times(array: Array, factor: float) -> Array:
    """Multiply an array, float32 or float64, by a weight, a scale, or both.

    Raises:
        NumberError: The factor or the product is outside of float32's range.
    """
    if factor == 1 or not math.prod(array.shape):
        return array
    if factor and not 1e-30 < abs(factor) <= 1:
        check_float32(abs(factor) * max(largest_of(array), float(abs(factor) > LARGEST["F32"])))
    return array * factor


def row_blocks(array: Array) -> list[slice]:
    """Cut an array of numpy into blocks of rows that stay in the processor's cache; one of torch is one block."""
    rows = len(array)
    step = max(1, rows) if is_torch(array) else rows_per_block(array.shape)
    return [slice(start, start + step) for start in range(0, rows, step)]


def rows_per_block(shape: Shape, size: int = BLOCK) -> int:
    """Return how many rows of an array make a block of so many numbers, at least 1."""
    return max(1, size * shape[0] // max(1, math.prod(shape)))


def keep_freed_memory(size: int = 1 << 24) -> None:
    """Have the allocator keep the memory that one module frees for the next, instead of returning it to the kernel.

    glibc raises its mmap threshold to the size of the largest block freed so far, so freeing one
    untouched block is enough.  It saves a fifth to a third of the time of a merge or a comparison.
    """
    import numpy as np

    np.empty(size, np.uint8)


def largest_of(array: Array) -> float:
    """Return the largest magnitude."""
    return max(float(array.max()), -float(array.min()))


def check_float32(largest: float) -> None:
    """Refuse numbers of which the largest magnitude is outside of the range of float32.

    Raises:
        NumberError: It is too large, too small and not zero, or NaN.
    """
    if not largest <= LARGEST["F32"] or 0 < largest < 2.0**-126:
        raise NumberError(
            f"its largest value, {largest:.4g}, is outside of the range of float32, in which layers are merged. "
            "Way out: another weight or alpha"
        )


def check_finite(array: Array) -> None:
    """Refuse NaN and infinity.

    Raises:
        NumberError: A value is not finite.
    """
    if not _all_finite(array):
        raise NumberError(f"a value is NaN or infinite (dtype {code(array)}, shape {tuple(array.shape)})")


def _all_finite(array: Array) -> bool:
    if is_torch(array):
        return not array.is_floating_point() or bool(array.float().isfinite().all())
    import numpy as np

    if (infinity := INFINITY.get(code(array))) and array.size:
        return int((np.ascontiguousarray(array).view(np.int16) & 0x7FFF).max()) < infinity
    if array.dtype.kind in "iub":
        return True
    return bool(np.isfinite(array).all())


INFINITY = {"F16": 0x7C00, "BF16": 0x7F80}
"""Bits of infinity; those of NaN are larger."""


def cast(array: Array, dtype: str) -> Array:
    """Convert to another dtype, rounded to nearest; refuse a value that is too large for it.

    Raises:
        NumberError: A finite value would become infinite.
    """
    if code(array) == dtype:
        return array
    if dtype in LARGEST and math.prod(array.shape):
        known = float32(array) if code(array).startswith("F8") else array  # torch can't take the maximum of float8
        largest = largest_of(known)
        check_not_faint(largest, dtype)
        check_not_large(largest, dtype)
    return rounded(array, dtype)


def rounded(array: Array, dtype: str) -> Array:
    """Do as `cast` does with values that are known to fit."""
    if is_torch(array):
        import torch

        return array.to(getattr(torch, NAMES[dtype]))
    if dtype == "F16" and code(array) == "F32":
        return _in_blocks(_float_to_half, array, "float16")
    return array.astype(numpy_dtype(dtype), copy=False)


def _float_to_half(array: Array) -> Array:
    """Move bits from float32 to float16, rounded as by numpy's cast.

    numpy takes 0.65 to 1.9 times as long for ordinary values (σ = 0.02), by the processor, and 4 to 48 times as long in
    matrices of LoRA's size where many values are subnormal (σ from 2e-4 to 2e-5).
    """
    import numpy as np

    bits = array.view(np.int32)
    power = np.maximum(bits & 0x7F800000, 0x38800000)  # the power of two in each value; 2^-14 for subnormals
    large = (power + 0x06C00000).view(np.float32)  # 1.5 * 2^13 times that: adding it rounds to float16's digits
    wide = array + large
    wide -= large
    wide *= np.float32(2.0**-112)
    half = wide.view(np.int32)
    half >>= 13
    half |= (bits >> 16) & -0x8000
    return half.astype(np.int16).view(np.float16)


def check_not_faint(largest: float, dtype: str) -> None:
    """Refuse a tensor whose values all become zero.

    Raises:
        NumberError: The largest of its magnitudes does.
    """
    if 0 < largest < SMALLEST.get(dtype, 0.0):
        raise NumberError(f"every value is 0 in {NAMES[dtype]}, the largest is {largest:.4g}; save as float32")


def check_not_large(largest: float, dtype: str) -> None:
    """Refuse values that would become infinite, infinity and NaN.

    Raises:
        NumberError: The largest of their magnitudes would.
    """
    if not largest <= LARGEST.get(dtype, sys.float_info.max):  # False for NaN too
        others = "float32 or bfloat16" if dtype == "F16" else "float32"
        raise NumberError(f"{largest:.4g} is too large for {NAMES[dtype]}; save as {others}")


LARGEST = {"F32": 3.4028235e38, "F16": 65519.0, "BF16": 3.3961e38, "F8_E4M3": 464.0, "F8_E5M2": 61439.0}
"""The largest magnitude that still rounds to a finite number."""

FAINT = 2.0**-13
"""Values with a smaller root mean square lose digits in float16: many of them are subnormal there."""


def fits_half(array: Array, faint: bool = True) -> bool:
    """Return whether float16 holds the values with all the digits that matter.

    Args:
        array: The values.
        faint: Also return False for values that are too small.
    """
    wide = float32(array)
    largest = float(abs(wide).max()) if math.prod(array.shape) else 0.0
    small = faint and 0 < float((wide * wide).mean()) < FAINT**2
    return largest <= LARGEST["F16"] and not small


SMALLEST = {"F32": 2.0**-150, "F16": 2.0**-25, "BF16": 2.0**-134, "F8_E4M3": 2.0**-10, "F8_E5M2": 2.0**-17}
"""Smaller magnitudes are rounded to zero."""


def take_rows(tensor: Array | Spec, ranges: Ranges) -> Array | Spec:
    """Return rows of a tensor, by ranges; for a Spec, the Spec of those rows."""
    if isinstance(tensor, Spec):
        return Spec((sum(b - a for a, b in ranges), *tensor.shape[1:]), tensor.dtype)
    if len(ranges) == 1:
        return tensor[ranges[0][0] : ranges[0][1]]
    return namespace(tensor).concat([tensor[a:b] for a, b in ranges])


def put_rows(array: Array, ranges: Ranges, values: Array) -> Array:
    """Write values over rows of an array, in place: the inverse of `take_rows`.

    Returns:
        The array.
    """
    start = 0
    for a, b in ranges:
        array[a:b] = values[start : start + b - a]
        start += b - a
    return array


def flatten(tensor: Array) -> Array:
    """Reshape ``(rows, …)`` to a matrix ``(rows, columns)``."""
    return tensor.reshape((tensor.shape[0], -1)) if tensor.ndim != 2 else tensor


def concat(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Concatenate arrays in their dtype, or in float32 where dtypes differ."""
    if len({array.dtype for array in arrays}) > 1:
        arrays = [float32(array) for array in arrays]
    return namespace(arrays[0]).concat(arrays, axis=axis)


def widened(tensor: Array | Spec, columns: int) -> Array | Spec:
    """Return a tensor with zeros behind the last of its columns, the second axis."""
    shape = (tensor.shape[0], columns - tensor.shape[1], *tensor.shape[2:])
    if isinstance(tensor, Spec):
        return Spec((shape[0], columns, *shape[2:]), tensor.dtype)
    return concat([tensor, namespace(tensor).zeros(shape, dtype=tensor.dtype, device=tensor.device)], axis=1)


def same_weight(a: Shape, b: Shape) -> bool:
    """Return whether two shapes are those of one weight, whose kernel is maybe flattened in one of them."""
    return a[:1] == b[:1] and math.prod(a) == math.prod(b)


def largest_rank(shape: Shape) -> int:
    """Return the largest rank of a weight of this shape, its kernel flattened: the smaller side."""
    return min(shape[0], math.prod(shape[1:]))


def reshape(tensor: Array | Spec, shape: Shape) -> Array | Spec:
    """Reshape a tensor or a Spec."""
    return Spec(shape, tensor.dtype) if isinstance(tensor, Spec) else tensor.reshape(shape)
