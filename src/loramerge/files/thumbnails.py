"""A picture in a file's header, in the entries where user interfaces look for it."""

import io
import os
from base64 import b64encode

from ..errors import FileError, first_line, needed
from .storage.paths import path_of
from .storage.texts import as_json, open_regular

THUMBNAIL, COVERS = "modelspec.thumbnail", "ssmd_cover_images"
"""The entries: a data URI (SwarmUI and other readers of ModelSpec), and a list of pictures in base64 (ComfyUI, Forge)."""

PICTURES = (THUMBNAIL, COVERS, "modelspec.preview_image", "thumbnail", "preview_image")
"""All entries in which readers look for pictures."""

SIGNATURES = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}

LARGEST = 100_000
"""The most bytes of a picture that is taken as it is; twice as a text it leaves most of ComfyUI's 1 MiB to the tensors' names."""

SIDE = 512
"""The longer side of a larger picture, in pixels, once it is scaled down."""


def thumbnail(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the entries that show a picture: a small JPEG, PNG or WebP as it is, any other scaled down to a JPEG.

    Raises:
        FileError: It can't be read, or isn't a picture.
        MissingExtraError: It must be scaled down, and Pillow is not installed.
    """
    file = path_of(path)
    with open(open_regular(file), "rb") as opened:
        data = opened.read(LARGEST + 1)
    kind = next((kind for signature, kind in SIGNATURES.items() if data.startswith(signature)), None)
    if kind is None or len(data) > LARGEST:
        data, kind = _scaled(file), "jpeg"
    text = b64encode(data).decode()
    return {THUMBNAIL: f"data:image/{kind};base64,{text}", COVERS: as_json([text])}


def _scaled(path: os.PathLike[str]) -> bytes:
    with needed(f"A thumbnail of anything but a JPEG, PNG or WebP of at most {LARGEST // 1000} kB"):
        from PIL import Image, ImageOps
    written = io.BytesIO()
    try:
        with open(open_regular(path), "rb") as file, Image.open(file) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG is then decoded at a fraction of its size
            upright = ImageOps.exif_transpose(image).convert("RGBA")
            upright.thumbnail((SIDE, SIDE))
            Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB").save(
                written, "JPEG"
            )
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(f"Can't read the picture {path}: {first_line(error)}.") from error
    return written.getvalue()


def shown(key: str, value: str) -> str | None:
    """Describe an entry that holds pictures in a few words: ``image/jpeg, 12345 characters``; None for any other."""
    if key not in PICTURES:
        return None
    kind = value[5:].partition(";")[0] if value.startswith("data:image/") else "pictures"
    return f"{kind}, {len(value)} characters"
