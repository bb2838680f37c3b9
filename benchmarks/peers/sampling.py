"""Choose the modules of a file that a slow peer is run on."""

from safetensors import safe_open

Shape = tuple[int, int]


def modules(path: str, count: int | None) -> dict[str, Shape]:
    """Return modules of a file with PEFT's key suffixes, with their weights' shapes.

    Args:
        path: The file.
        count: How many of them, every shape in its proportion; None for all.
    """
    with safe_open(path, "np") as file:
        keys = sorted(file.keys())
        names = [key.removesuffix(".lora_A.weight") for key in keys if key.endswith(".lora_A.weight")]
        shapes = {name: _shape(file, name) for name in names}
    if not shapes:
        raise ValueError(f"{path} has no key that ends in .lora_A.weight.")
    by_shape = sorted(names, key=lambda name: (shapes[name], name))
    total = len(names)
    count = total if count is None else count
    return {name: shapes[name] for name in (by_shape[(2 * i + 1) * total // (2 * count)] for i in range(count))}


def _shape(file: safe_open, name: str) -> Shape:
    rows = file.get_slice(f"{name}.lora_B.weight").get_shape()[0]
    columns = file.get_slice(f"{name}.lora_A.weight").get_shape()[1]
    return rows, columns
