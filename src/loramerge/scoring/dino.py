"""An encoder from the DINOv2 of transformers.

from loramerge.scoring.dino import dinov2
from loramerge.scoring.scores import score

scores = score({"merged": "out/merged"}, {"person": "photos/person"}, dinov2())
print(scores.mean("merged", "person"))

Source: Oquab et al., 2023, https://arxiv.org/abs/2304.07193
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..devices import check_device
from ..errors import FileError, OptionError, first_line, needed
from ..files.storage.digests import file_digest
from ..files.storage.paths import path_of
from ..tensors import Array
from .encoders import Encoder
from .pictures import Preprocessing
from .quiet import silence

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT = "facebook/dinov2-base"
KINDS = ("dinov2", "dinov2_with_registers")
FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")

Pool = Literal["cls", "patches"]
"""``cls``: the class token, as in the study.  ``patches``: the mean of the patches' tokens."""


def dinov2(
    model: str | os.PathLike[str] = DEFAULT,
    *,
    pool: Pool = "cls",
    preprocessing: Preprocessing | None = None,
    revision: str | None = None,
    device: str | None = None,
    batch: int = 16,
    quiet: bool = False,
) -> Encoder:
    """Load a DINOv2, with or without registers, as an encoder.

    Args:
        model: A name on the Hugging Face Hub, or a directory.
        pool: The tokens of the last layer, after its normalisation, that make the vector.
        preprocessing: Used instead of the model's ``preprocessor_config.json``.
        revision: Revision of the Hub's repository.
        device: Where to compute; by default CUDA if there is a GPU.
        batch: Pictures per pass.
        quiet: True silences transformers in this process.

    Raises:
        FileError: The model isn't found, or can't be read.
        OptionError: It isn't a DINOv2, or ``pool`` or the device is unknown.
        MissingExtraError: transformers is not installed.
    """
    if pool not in get_args(Pool):
        raise OptionError(f"Unknown pool {pool!r}. Available: {', '.join(get_args(Pool))}.")
    transformers = _transformers()
    import torch

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(place)
    if quiet:
        silence("transformers")
    folder = _directory(str(model), revision)
    config = _asked(str(model), lambda: transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
    if config.model_type not in KINDS:
        raise OptionError(f"{model} is a {config.model_type}, wanted a DINOv2: {' or '.join(KINDS)}.")
    prepare = preprocessing or Preprocessing.read(folder / "preprocessor_config.json")
    network = _network(str(model), folder, transformers)
    network = network.to(place).eval()
    registers = getattr(config, "num_register_tokens", 0)
    digest = _digest(folder)

    @torch.inference_mode()
    def embed(images: Sequence["Image"]) -> Array:
        prepared = torch.stack([torch.from_numpy(prepare(image)) for image in images])
        tokens = network(pixel_values=prepared.to(network.device)).last_hidden_state
        return tokens[:, 0] if pool == "cls" else tokens[:, 1 + registers :].mean(1)

    name = f"{model}" if pool == "cls" else f"{model}, patches"
    return Encoder(embed, name, f"dinov2 {digest} {pool} {prepare}", batch)


def _network(name: str, folder: Path, transformers: Any) -> Any:
    """Load the model; refuse one that lacks weights."""
    import torch

    network, report = _asked(
        name,
        lambda: transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        ),
    )
    missing = [key for key in report["missing_keys"] if "mask_token" not in key]  # only training masks
    if missing or report["mismatched_keys"]:
        some = ", ".join(map(str, [*missing, *report["mismatched_keys"]][:3]))
        raise FileError(f"{name} lacks weights of its own configuration, such as {some}: the file is not whole.")
    return network


def _directory(model: str, revision: str | None) -> Path:
    """Return the folder of the model's files, downloaded from the Hub if the name isn't a directory."""
    if (folder := path_of(model)).is_dir():
        return folder
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileError(f"No such directory: {model}.")
    import huggingface_hub

    def fetch() -> Any:
        return huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(FILES))

    return Path(_asked(model, fetch))


def _asked(model: str, ask: Any) -> Any:
    try:
        return ask()
    except Exception as error:  # transformers and the Hub's client raise their own and the system's errors
        raise FileError(
            f"Can't get the model {model}: {first_line(error).rstrip('.')}. Wanted a DINOv2 on the Hugging Face "
            f"Hub, such as {DEFAULT}, or a directory with its config.json and weights. Check the name and the network."
        ) from error


def _digest(folder: Path) -> str:
    """Return the SHA-256 of the model's files, the key of cached vectors: it doesn't depend on the model's folder."""
    whole = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".json", ".safetensors", ".bin") and "preprocessor" not in file.name:
            whole.update(f"{file.name} {file_digest(file)}\n".encode())
    return whole.hexdigest()


def _transformers() -> Any:
    with needed("Scoring with DINOv2"):
        import transformers
    return transformers
