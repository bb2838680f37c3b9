"""LoRA files: reading and writing them in any dialect, and what their names mean."""

from typing import TYPE_CHECKING

from ..registry import face

if TYPE_CHECKING:
    from .architectures import ARCHITECTURES as ARCHITECTURES, Architecture as Architecture
    from .architectures.blocks import block as block, vector as vector
    from .dialects import DIALECTS as DIALECTS, Dialect as Dialect
    from .editing import edit_metadata as edit_metadata, read_metadata as read_metadata
    from .lora import LoRA as LoRA, from_tensors as from_tensors
    from .reading import Readable as Readable, Source as Source, load as load, open as open
    from .storage.digests import file_digest as file_digest, listing_digest as listing_digest
    from .storage.pickles import PICKLES as PICKLES
    from .storage.scratch import make_folder as make_folder
    from .storage.texts import read_json as read_json, read_text as read_text, visible as visible
    from .storage.writer import write_text as write_text
    from .writing import convert as convert, save as save, saved_size as saved_size
else:
    __getattr__, __dir__, __all__ = face(
        __name__,
        {
            "editing": ("edit_metadata", "read_metadata"),
            "lora": (
                "LoRA",
                "from_tensors",
            ),
            "reading": (
                "Readable",
                "Source",
                "load",
                "open",
            ),
            "writing": (
                "convert",
                "save",
                "saved_size",
            ),
            "architectures": (
                "ARCHITECTURES",
                "Architecture",
            ),
            "architectures.blocks": (
                "block",
                "vector",
            ),
            "dialects": (
                "DIALECTS",
                "Dialect",
            ),
            "storage.pickles": ("PICKLES",),
            "storage.digests": (
                "file_digest",
                "listing_digest",
            ),
            "storage.scratch": ("make_folder",),
            "storage.texts": (
                "read_json",
                "read_text",
                "visible",
            ),
            "storage.writer": ("write_text",),
        },
    )
