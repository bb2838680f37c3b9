"""safetensors files: read lazily, written atomically."""
