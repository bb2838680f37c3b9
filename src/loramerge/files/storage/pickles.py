"""Tensors out of pickles, by torch's weights_only loader: nothing else in the file is made or run."""

import io
import os
from typing import Any, BinaryIO

from ...errors import FileError, NotALoRAError, first_line, needed
from ...tensors import Array, Held, Tensor, code, is_known, numpy_dtype
from ..dialects.suffixes import parse
from .texts import open_regular

PICKLES = (".pt", ".bin", ".ckpt", ".pth")
"""Ends of their file names."""


def pickled(path: str, allow: bool) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a pickle by key, and the name of the inner dictionary that holds them, if there is one.

    Args:
        path: The file.
        allow: Whether the user has allowed opening it.

    Raises:
        FileError: It isn't allowed, or the file holds something other than plain tensors.
    """
    if not allow:
        raise FileError(
            f"{os.path.basename(path)} is a pickle, which can run code when it is opened. Way out: have its tensors read, and "
            "nothing else, with torch's weights_only loader (allow_pickle)."
        )
    with needed("Reading a pickle"):
        import torch

    _check_zip(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a wide range: pickle, zip, runtime and value errors
        raise FileError(f"Can't read {path} as tensors only: {first_line(error)}") from error
    for _ in range(3):  # a limit, because a pickled dictionary can contain itself
        found = found["state_dict"] if isinstance(found, dict) and "state_dict" in found else found
    if not isinstance(found, dict):
        raise FileError(f"{path} holds a {type(found).__name__}, wanted a dictionary of tensors.")
    tensors, inside = _tensors(path, found)
    for key, value in tensors.items():
        _check_plain(path, key, value)
    return {key: Held(_as_numpy(value)) for key, value in tensors.items()}, inside


def _tensors(path: str, found: dict[Any, Any]) -> tuple[dict[str, Any], str | None]:
    """Return the tensors of a dictionary, or of the only inner one that holds a LoRA, and its name."""
    tensors = _among(path, found)
    inner = {
        _text(path, name): held
        for name, value in found.items()
        if isinstance(value, dict) and (held := _among(path, value))
    }
    if not inner or any(map(parse, tensors)):
        return tensors, None
    loras = [name for name, held in inner.items() if any(map(parse, held))]
    if len(loras) == 1 and "ip_adapter" not in inner:
        return inner[loras[0]], loras[0]
    what = ": an IP-Adapter" if "ip_adapter" in inner else ""
    raise NotALoRAError(
        f"{path} holds no LoRA itself, but the dictionaries {', '.join(inner)}{what}. Way out: save the one that is a "
        "LoRA to a file of its own."
    )


def _among(path: str, found: dict[Any, Any]) -> dict[str, Any]:
    import torch

    return {_text(path, key): value for key, value in found.items() if isinstance(value, torch.Tensor)}


def _text(path: str, key: object) -> str:
    if not isinstance(key, str):
        raise FileError(f"{path}: a key is a {type(key).__name__}, wanted text.")
    return key


def _check_zip(path: str) -> None:
    """Reject zips with compressed records (torch never compresses, so they are likely zip bombs) and tuple bombs."""
    import zipfile

    os.close(open_regular(path))  # torch would wait for a pipe
    try:
        with zipfile.ZipFile(path) as file:
            packed = [record.filename for record in file.infolist() if record.compress_type != zipfile.ZIP_STORED]
            for record in file.infolist():
                if record.filename.endswith("data.pkl") and not packed:
                    _check_tuples(path, io.BytesIO(file.read(record)))
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        # Not a zip, like pickles before torch 1.6, or one that torch will refuse.
        with open(path, "rb") as plain:
            _check_tuples(path, plain)
        return
    if packed:
        raise FileError(f"Can't read {path} as tensors only: its record {packed[0]!r} is compressed; torch's are not.")


MAX_NESTED = 1_000_000
"""Tuples that a tuple in a pickle may hold, on all levels; one that is named twice counts twice."""

MAX_OPCODES = 2_000_000
"""Opcodes that a pickle may have: a tensor takes about thirty."""


def _check_tuples(path: str, file: BinaryIO) -> None:
    """Reject tuples that name the tuple below several times, on many levels: to hash one as a key never ends.

    Nothing is built: the opcodes are followed, with the size of a tuple in its place on the stack.
    """
    import pickletools

    try:
        for _ in range(5):  # before torch 1.6 a file was five pickles one after the other, and the numbers
            stack: list[int | None] = []
            memo: dict[int, int] = {}
            for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                taken = _taken(stack, [each.name for each in opcode.stack_before])
                if opcode.name.startswith("TUPLE"):
                    taken = [1 + sum(taken)]
                elif "GET" in opcode.name:
                    taken = [memo.get(int(argument or 0), 0)]
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = taken[0]
                elif "PUT" in opcode.name:
                    memo[int(argument or 0)] = stack[-1] or 0
                made = [taken[0] if taken else 0] * len(opcode.stack_after)
                stack += [None] if opcode.name == "MARK" else made
                if max(made, default=0) > MAX_NESTED or number > MAX_OPCODES:
                    what = (
                        "it has too many entries"
                        if number > MAX_OPCODES
                        else "it nests tuples in tuples without measure"
                    )
                    raise FileError(f"Can't read {path} as tensors only: {what}.")
    except (ValueError, IndexError):  # no pickle, or the numbers after one
        return


def _taken(stack: list[int | None], names: list[str]) -> list[int]:
    """Take what an opcode uses off the stack, down to the last mark for one that uses a slice."""
    taken = []
    if "mark" in names:
        while (size := stack.pop()) is not None:
            taken.append(size)
        names = names[: names.index("mark")]
    return [stack.pop() or 0 for _ in names][::-1] + taken


def _check_plain(path: str, key: str, tensor: Any) -> None:
    """Reject tensors that aren't dense and fully stored (sparse, quantised, or expanded views)."""
    import torch

    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and is_known(tensor)
    if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise FileError(
            f"{path}: the tensor {key!r} (dtype {tensor.dtype}, shape {tuple(tensor.shape)}) is not stored number by "
            "number, wanted plain tensors of floats."
        )


def _as_numpy(tensor: Any) -> Array:
    import torch

    tensor = tensor.detach().resolve_neg()
    if code(tensor) in ("BF16", "F8_E4M3", "F8_E5M2"):
        bits = tensor.contiguous().view(torch.uint8 if tensor.element_size() == 1 else torch.int16).numpy()
        return bits.view(numpy_dtype(code(tensor)))
    return tensor.numpy()
