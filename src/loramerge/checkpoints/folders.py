"""The files of a model in a directory: diffusers' components, whole or in shards, or ComfyUI's folders."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..files.architectures.names import COMPONENTS
from ..files.storage.texts import read_json

SHARD = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?"
    r"(?:-(?P<number>\d{5})-of-(?P<count>\d{5})(?:\.(?P<late>\w+))?)?\.safetensors"
)
"""A file of weights in a diffusers folder; the variant is named before or after the shard's number."""

FOLDERS = ("diffusion_models", "text_encoders")
"""ComfyUI's folders of models whose parts are files of their own."""


def files_of(root: Path, variant: str | None) -> dict[Path, str]:
    """Map each file of weights in a diffusers directory to the prefix of its component."""
    components = [name for name in COMPONENTS if (root / name).is_dir()]
    folders = [root / name for name in components] or [root]
    if variant and not any(variant in _variants(folder) for folder in folders):
        raise FileError(f"{root} has no file of the variant {variant!r}.")
    found = {file: f"{name}." for name in components for file in weight_files(root / name, variant)}
    alone = {} if found else dict.fromkeys(weight_files(root, variant) or _split_files(root), "")
    if not found and not alone:
        raise FileError(
            f"{root} is no model: none of {', '.join((*COMPONENTS, *FOLDERS))} in it has a .safetensors file."
        )
    return found or alone


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """List the files of one variant of a component's weights: one, or every shard.

    Raises:
        FileError: The variant is left open, or a shard is missing.
    """
    variants = _variants(folder)
    if variant and variant in variants:
        chosen = variants[variant]
    elif len(variants) > 1 and "" not in variants:
        raise FileError(f"{folder} has the variants {', '.join(variants)}; name one.")
    else:  # a component may lack the variant that others have
        chosen = variants.get("") or next(iter(variants.values()), {})
    return _all_shards(folder, chosen)


def _variants(folder: Path) -> dict[str, dict[Path, re.Match[str]]]:
    """Find the files of weights in a folder, by variant."""
    variants: dict[str, dict[Path, re.Match[str]]] = {}
    for file in sorted(folder.iterdir()):
        if match := SHARD.fullmatch(file.name):
            variants.setdefault(match["variant"] or match["late"] or "", {})[file] = match
    return variants


def _all_shards(folder: Path, files: Mapping[Path, re.Match[str]]) -> list[Path]:
    counts = {int(match["count"] or 0) for match in files.values()}
    numbers = {int(match["number"] or 0) for match in files.values()}
    if len(counts) > 1:
        raise FileError(f"{folder} has the files of several models: {', '.join(file.name for file in files)}.")
    missing = sorted(set(range(1, max(counts, default=0) + 1)) - numbers)
    if missing:
        named = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise FileError(f"{folder}: of {max(counts)} shards these are missing: {named}.")
    return list(files)


def _split_files(root: Path) -> list[Path]:
    """List the files of a model that is split as ComfyUI's are: one denoiser, and its text encoders.

    Raises:
        FileError: There are several denoisers.
    """
    denoisers, encoders = (sorted((root / folder).glob("*.safetensors")) for folder in FOLDERS)
    if len(denoisers) > 1:
        names = ", ".join(file.name for file in denoisers)
        raise FileError(
            f"{root / FOLDERS[0]} has {len(denoisers)} files: {names}. Ways out: name one of them as the model, or a "
            f"directory that has one there, and its text encoders in {FOLDERS[1]}."
        )
    return [*denoisers, *encoders]


def shard_indexes(folder: Path) -> dict[Path, dict[str, Any]]:
    """Read the indexes in a folder that list shards: which tensor is in which file."""
    found = {}
    for path in sorted(folder.glob("*.index*.json")):
        index = found[path] = read_json(path)
        shards, about = index.get("weight_map"), index.get("metadata", {})
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise FileError(f"{path} is no index of shards: its weight_map doesn't map tensors to files.")
        if not isinstance(about, dict):
            raise FileError(f"{path} is no index of shards: its metadata is not an object.")
    return found
