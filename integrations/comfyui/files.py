"""ComfyUI's folders: the only files that a workflow can name, whoever sent it."""

import os
from pathlib import Path

import folder_paths

from loramerge.errors import OptionError

BASES = ("checkpoints", "diffusion_models")


def loras() -> list[str]:
    """Return the names of the files in the folders of LoRAs, as ComfyUI lists them."""
    return folder_paths.get_filename_list("loras")


def bases() -> list[str]:
    """Return the names of the base models, behind an empty one for none."""
    return ["", *(name for kind in BASES for name in folder_paths.get_filename_list(kind))]


def lora(name: str) -> Path:
    """Return the path of a LoRA.

    Args:
        name: Its name in the list, or that of the file alone, as the recipe of a merge has it.

    Raises:
        OptionError: There is no such file, or several.
    """
    listed = loras()
    found = [name] if name in listed else [each for each in listed if os.path.basename(each) == name]
    if len(found) != 1:
        several = (
            f"{' and '.join(found)} have this name" if found else "no file in ComfyUI's folders of LoRAs has this name"
        )
        raise OptionError(
            f"Can't find the LoRA {name!r}: {several}. Way out: the name as the node 'LoRA file' lists it."
        )
    return Path(folder_paths.get_full_path_or_raise("loras", found[0]))


def base(name: str) -> Path | None:
    """Return the path of a base model; None for an empty name.

    Raises:
        OptionError: There is no such file in ComfyUI's folders of models.
    """
    if not name:
        return None
    for kind in BASES:
        if name in folder_paths.get_filename_list(kind):
            return Path(folder_paths.get_full_path_or_raise(kind, name))
    raise OptionError(f"Can't find the base model {name!r}: it is in neither of the folders {' and '.join(BASES)}.")


def target(name: str, overwrite: bool) -> Path:
    """Return the path of a new LoRA in ComfyUI's first folder of LoRAs; the folder that the name has is made.

    Args:
        name: A name such as ``person`` or ``people/person.safetensors``.
        overwrite: Whether a file with this name may be replaced.

    Raises:
        OptionError: The name leads out of the folder, or there is such a file.
    """
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    path = folder / (name if name.endswith(".safetensors") else f"{name}.safetensors")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)) or path.suffix != ".safetensors":
        raise OptionError(
            f"Can't save as {name!r}: wanted a name inside ComfyUI's folder of LoRAs, such as people/person."
        )
    if path.exists() and not overwrite:
        raise OptionError(f"{path.name} is there already. Way out: another name, or overwrite.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def name_of(path: Path) -> str:
    """Return the name by which ComfyUI lists a file in its first folder of LoRAs."""
    return os.path.relpath(path, folder_paths.get_folder_paths("loras")[0])


def state(*paths: Path) -> str:
    """Return a text that changes when one of these files does."""
    return " ".join(f"{found.st_mtime_ns}-{found.st_size}" for found in (path.stat() for path in paths))
