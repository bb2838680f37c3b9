"""ComfyUI's module of this name, as far as the nodes use it."""

import os
from pathlib import Path

folders: dict[str, list[str]] = {"loras": [], "checkpoints": [], "diffusion_models": []}


def get_folder_paths(kind: str) -> list[str]:
    return folders[kind]


def get_filename_list(kind: str) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for folder in folders[kind]
        for path in Path(folder).rglob("*")
        if path.is_file()
    )


def get_full_path_or_raise(kind: str, name: str) -> str:
    inside = os.path.relpath(os.path.join("/", name), "/")
    for folder in folders[kind]:
        if os.path.isfile(os.path.join(folder, inside)):
            return os.path.join(folder, inside)
    raise FileNotFoundError(name)
