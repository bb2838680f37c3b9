"""Text encoders in files of their own, as ComfyUI has them beside a denoiser's file."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from ..errors import FileError
from ..files.architectures import ARCHITECTURES, TextEncoder, model, titles
from ..files.storage.reader import SafetensorsFile
from ..tensors import Shape

Hosts = dict[str, TextEncoder]
"""The families that a text encoder may belong to, each with what it is there."""


def hosts(shapes: Mapping[str, Shape]) -> Hosts:
    """Return the families that have a text encoder with the weights of a file; none if it is something else."""
    matrices = {key.removesuffix(".weight"): s for key, s in shapes.items() if key.endswith(".weight") and len(s) == 2}
    found: Hosts = {}
    for a in ARCHITECTURES.values():
        for encoder in a.text_encoders:
            known = _known(encoder.model)
            named = sum(known.get(stem.removeprefix(encoder.inside)) == shape for stem, shape in matrices.items())
            if matrices and named >= 0.9 * len(matrices):
                found.setdefault(a.name, encoder)
    return found


@cache
def _known(name: str) -> dict[str, Shape]:
    """Return the shapes of an encoder's weights by path, with and without the level that transformers 5 leaves out."""
    return {short: shape for path, shape in model(name).items() for short in (path, path.removeprefix("text_model."))}


def family_of(root: Path, texts: Mapping[Path, Hosts], said: str | None, likely: Sequence[str]) -> str:
    """Return the family of a model that has text encoders in files of their own.

    Args:
        root: Its path.
        texts: The families that each text encoder may belong to.
        said: The family that its denoiser is of, or that the caller names.
        likely: Families to choose from, if that is left open: those of the LoRAs.

    Raises:
        FileError: A text encoder isn't one of the family's, or the family is left open.
    """
    common = [name for name in ARCHITECTURES if all(name in found for found in texts.values())]
    chosen = [name for name in common if name in ([said] if said else likely or common)]
    if len(chosen) == 1:
        return chosen[0]
    wrong = [file.name for file, found in texts.items() if said not in found]
    if said:
        raise FileError(f"{root}: {', '.join(wrong)} isn't a text encoder of {titles([said])}.")
    listed = ", ".join(file.name for file in texts)
    if not common:
        raise FileError(f"{root}: no model that loramerge knows has all of these text encoders: {listed}.")
    raise FileError(
        f"{root}: {listed} alone may be a text encoder of {titles(common)}. Way out: say which, "
        f"--architecture {common[0]} (in Python open_checkpoint(…, architecture={common[0]!r}))."
    )


def prefixes(family: str, texts: Mapping[Path, Hosts], files: Mapping[Path, SafetensorsFile]) -> dict[Path, str]:
    """Return what to put before the names in each text encoder's file.

    Raises:
        FileError: Two files are the same encoder.
    """
    found: dict[Path, str] = {}
    for file, families in texts.items():
        encoder = families[family]
        inside = bool(encoder.inside) and any(key.startswith(encoder.inside) for key in files[file])
        prefix = f"text_encoders.{encoder.comfyui}.transformer." if inside else f"{encoder.component}."
        if prefix in found.values():
            other = next(path for path, taken in found.items() if taken == prefix)
            raise FileError(f"{other} and {file} are the same text encoder. Way out: keep one of them there.")
        found[file] = prefix
    return found
