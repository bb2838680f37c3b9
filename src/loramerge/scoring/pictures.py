"""Pictures in files, and how they are prepared for an encoder.

`Preprocessing` does the same as transformers' own PIL processor, from the same
``preprocessor_config.json``; it doesn't need torchvision.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FileError, MissingExtraError, OptionError
from ..files.storage.texts import open_regular, read_json
from ..tensors import Array

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LONGEST = 10_000
"""The most pixels of a side that a preprocessor asks for."""

CAPTIONS = (".txt", ".jsonl")
"""Endings of files that hold captions."""


@dataclass(frozen=True)
class Box:
    """A part of a picture: its edges as shares of the width and the height, in [0, 1]."""

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1):
            raise OptionError(
                f"Can't crop to left {self.left:g}, top {self.top:g}, right {self.right:g}, bottom {self.bottom:g}: "
                "wanted shares from 0 to 1, left below right and top below bottom."
            )

    @classmethod
    def parse(cls, text: str) -> "Box":
        """Parse ``left,top,right,bottom``."""
        try:
            left, top, right, bottom = map(float, text.split(","))
        except ValueError:
            raise OptionError(
                f"Can't read the box {text!r}: wanted left,top,right,bottom, such as 0.2,0.4,0.8,1."
            ) from None
        return cls(left, top, right, bottom)

    def of(self, image: "Image") -> "Image":
        """Return the part of a picture, at least one pixel."""
        if self == Box():
            return image
        left, top = math.floor(self.left * image.width), math.floor(self.top * image.height)
        return image.crop((left, top, math.ceil(self.right * image.width), math.ceil(self.bottom * image.height)))


def read(path: Path) -> "Image":
    """Read a picture, upright, in RGB, with transparency on white.

    Raises:
        FileError: It is missing, isn't a picture, is truncated, or has more than 8 bits per channel.
        MissingExtraError: Pillow is not installed.
    """
    with opened(path) as image:
        from PIL import ImageOps

        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise FileError(f"Can't read {path}: it has more than 8 bits per channel ({image.mode}). Convert it to 8.")
        return rgb(ImageOps.exif_transpose(image))


@contextmanager
def opened(path: Path) -> "Iterator[Image]":
    """Open a picture's file, whose pixels can be read inside the block.

    Raises:
        FileError: It is missing, isn't a picture, or is truncated.
        MissingExtraError: Pillow is not installed.
    """
    pil = _pil()
    try:
        with open(open_regular(path), "rb") as file, pil.open(file) as image:
            yield image
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise FileError(f"Can't read the image {path}: {error}.") from error


def bytes_of(path: Path) -> bytes:
    """Read the bytes of a picture's file.

    Raises:
        FileError: It can't be read.
    """
    try:
        with open(open_regular(path), "rb") as file:
            return file.read()
    except OSError as error:
        raise FileError(f"Can't read the image {path}: {error.strerror}.") from None


def rgb(image: "Image") -> "Image":
    """Convert a picture to RGB, with transparency on white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return _pil().alpha_composite(_pil().new("RGBA", image.size, "white"), image).convert("RGB")


def pictures_in(folder: Path) -> list[Path]:
    """List the pictures directly in a folder that exists, sorted by name; it may have none."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")


def images_in(folder: Path) -> list[Path]:
    """List the pictures directly in a folder, sorted by name.

    Raises:
        FileError: It is missing, or has none.
    """
    if not folder.is_dir():
        raise FileError(f"No such directory of images: {folder}.")
    found = pictures_in(folder)
    if not found:
        raise FileError(f"{folder} holds no image; wanted files that end in {', '.join(SUFFIXES)}.")
    return found


def ignored_in(folder: Path) -> str:
    """Say in a sentence which files of a folder are neither pictures nor captions; empty if there are none."""
    others = sorted(
        f"{file.name}/" if file.is_dir() else file.name
        for file in folder.iterdir()
        if file.suffix.lower() not in (*SUFFIXES, *CAPTIONS) and file.name[0] != "."
    )
    if not others:
        return ""
    return (
        f"{folder}: left out are {', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}; "
        f"only files that end in {', '.join(SUFFIXES)} are pictures here."
    )


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The steps that prepare a picture for an encoder, in this order; None leaves a step out.

    The defaults are those of transformers' ``BitImageProcessor``, which DINOv2 uses.
    """

    shortest_edge: int | None = 224
    """The shorter side is resized to this length, the other in proportion."""
    size: tuple[int, int] | None = None
    """Height and width, instead of ``shortest_edge``."""
    resample: int = 3
    """Pillow's number for a filter: 3 is bicubic."""
    crop: tuple[int, int] | None = (224, 224)
    """Height and width of the centre crop; a smaller picture gets a black border."""
    factor: float | None = 1 / 255
    mean: tuple[float, ...] | None = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] | None = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def read(cls, path: Path) -> "Preprocessing":
        """Read a ``preprocessor_config.json``.

        Raises:
            FileError: It is missing or unreadable, or describes another kind of processor.
        """
        try:
            return cls._of(read_json(path))
        except FileError as error:
            raise FileError(
                f"{error} It says how to prepare pictures for the model: copy it "
                "there from the model's source, or give preprocessing=."
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileError(f"Can't read {path}: {error}.") from None

    @classmethod
    def _of(cls, config: Mapping[str, Any]) -> "Preprocessing":
        kind = config.get("image_processor_type", config.get("feature_extractor_type", "BitImageProcessor"))
        if not str(kind).startswith("BitImageProcessor") or config.get("do_pad"):
            raise ValueError(f"it describes a {kind}, wanted a BitImageProcessor without padding")
        size, crop = config.get("size", {}), config.get("crop_size", {})
        size = {"shortest_edge": size} if isinstance(size, int) else size or {"shortest_edge": 224}
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop or {"height": 224, "width": 224}
        if "shortest_edge" not in size and not {"height", "width"} <= set(size):
            raise ValueError(f"its size is {size}, wanted shortest_edge, or height and width")
        resize = config.get("do_resize", True)
        normalise = config.get("do_normalize", True)
        found = cls(
            shortest_edge=size.get("shortest_edge") if resize else None,
            size=(size["height"], size["width"]) if resize and "shortest_edge" not in size else None,
            resample=config.get("resample", 3),
            crop=(crop["height"], crop["width"]) if config.get("do_center_crop", True) else None,
            factor=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else None,
            mean=tuple(config.get("image_mean", cls.mean)) if normalise else None,
            std=tuple(config.get("image_std", cls.std)) if normalise else None,
        )
        shortest = () if found.shortest_edge is None else (found.shortest_edge,)
        lengths = [*shortest, *(found.size or ()), *(found.crop or ())]
        if any(type(n) is not int or not 0 < n <= LONGEST for n in lengths) or found.resample not in range(6):
            raise ValueError(
                f"its lengths are {lengths} and its filter {found.resample!r}, wanted 1 to {LONGEST}, 0 to 5"
            )
        if not all(abs(sum(three)) < math.inf and len(three) == 3 for three in (found.mean, found.std) if three):
            raise ValueError("its mean and its std are not three numbers each")
        if (found.std and 0 in found.std) or not isinstance(found.factor, int | float | None):
            raise ValueError(f"its std has a zero, or its factor is {found.factor!r}, which is no number")
        return found

    def __call__(self, image: "Image") -> Array:
        """Return the picture as the encoder takes it: ``(3, height, width)``, float32."""
        import numpy as np

        image = rgb(image)
        height, width = self._target(image)
        values: Array = np.asarray(image.resize((width, height), resample=self.resample))
        if self.crop:
            values = centre(values, *self.crop)
        values = values.astype(np.float64) * (self.factor or 1.0)
        values = values.astype(np.float32)
        if self.mean and self.std:
            values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))

    def _target(self, image: "Image") -> tuple[int, int]:
        """Return height and width after the resize."""
        if self.size:
            return self.size
        if not self.shortest_edge:
            return image.height, image.width
        long = int(self.shortest_edge * max(image.size) / min(image.size))
        return (long, self.shortest_edge) if image.width <= image.height else (self.shortest_edge, long)


def centre(values: Array, height: int, width: int) -> Array:
    """Crop the middle of an image ``(h, w, c)``; pad a smaller one with zeros."""
    import numpy as np

    tall, wide = max(height, values.shape[0]), max(width, values.shape[1])
    padded = np.zeros((tall, wide, values.shape[2]), values.dtype)
    top, left = math.ceil((tall - values.shape[0]) / 2), math.ceil((wide - values.shape[1]) / 2)
    padded[top : top + values.shape[0], left : left + values.shape[1]] = values
    # transformers rounds the crop's offset down before it adds the padding's, so this isn't simply the middle
    top += (values.shape[0] - height) // 2
    left += (values.shape[1] - width) // 2
    return padded[top : top + height, left : left + width]


def downscaled(images: Sequence["Image"], side: int) -> Array:
    """Return the baseline of an embedding: ``side`` × ``side`` pixels, in [0, 1], one vector per picture."""
    import numpy as np

    small = [rgb(image).resize((side, side), _pil().Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image, np.float32).ravel() / 255 for image in small])


def _pil() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("Pictures need Pillow: pip install 'loramerge[diffusers]'.") from None
    return Image
