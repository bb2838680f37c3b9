"""loramerge in ComfyUI: nodes that read, compare, merge, resize, apply and save LoRAs."""

try:
    from .schema import comfy_entrypoint as comfy_entrypoint
except ImportError as error:
    if not (error.name or "").startswith("comfy_api"):
        raise
    # This ComfyUI is older than its V3 schema; a newer one would ignore `comfy_entrypoint` if these were here too.
    from .mappings import (
        NODE_CLASS_MAPPINGS as NODE_CLASS_MAPPINGS,
        NODE_DISPLAY_NAME_MAPPINGS as NODE_DISPLAY_NAME_MAPPINGS,
    )
