"""Rules that map weights of a model's own code to modules of diffusers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import NamedTuple, TypeAlias

from ...tensors import Ranges, Shape

COMPONENTS = ("unet", "transformer", "prior", "text_encoder", "text_encoder_2", "text_encoder_3", "text_conditioner")
"""Components that LoRAs are made for: folders of diffusers' layout, and first parts of modules' names."""


INPUTS = (
    *("conv_in", "x_embedder", "x_embedder.proj", "img_in", "proj_in", "pos_embed.proj"),
    *("patch_embedding", "patch_embed.proj", "all_x_embedder.2-1"),
)
"""Input layers, which models with more latent channels (FLUX control, inpainting, image to video) widen."""


class Part(NamedTuple):
    """A module inside a weight of the model's own code."""

    module: str
    rows: Ranges | None
    """The weight's rows that are the module's, in the module's order; None if the weight is the module's as it is."""


Parts: TypeAlias = tuple[Part, ...]
"""The modules of one weight, in the order of its rows."""

SWAP = "swap"
"""Marks a rule whose two halves of rows are exchanged: (shift, scale) against (scale, shift)."""

Rule: TypeAlias = tuple[str, ...]
"""A native name, then the diffusers names that it holds, ``{i}`` standing for a block's number."""


Naming: TypeAlias = Callable[[Mapping[str, Shape]], Mapping[str, Parts]]
"""Native names of a model's weights, from its modules, each with the modules that it holds."""


class Rules(NamedTuple):
    """A naming by the rules in a file beside this one, which is imported when they are used."""

    file: str
    name: str = "native"

    def __call__(self, modules: Mapping[str, Shape]) -> Mapping[str, Parts]:
        """Name a model's weights."""
        naming: Naming = getattr(import_module(f".{self.file}", __package__), self.name)
        return naming(modules)


def flat(path: str) -> str:
    """Return a path as kohya's tools write it: with underscores for dots."""
    return path.replace(".", "_")


def whole(module: str) -> Parts:
    """Return the parts of a weight that is one module's."""
    return (Part(module, None),)


def stacked(modules: Iterable[tuple[str, int]]) -> Parts:
    """Return the parts of a weight that stacks modules; each comes with its number of rows."""
    parts, start = [], 0
    for module, rows in modules:
        parts.append(Part(module, ((start, start + rows),)))
        start += rows
    return tuple(parts)


def swapped(module: str, rows: int) -> Parts:
    """Return the parts of a weight whose halves of rows are exchanged against the module's."""
    half = rows // 2
    return (Part(module, ((half, rows), (0, half))),)


def apply(rules: Iterable[Rule], modules: Mapping[str, Shape], component: str) -> dict[str, Parts]:
    """Apply rules to get the native names of a model.

    A rule applies to every block whose modules exist; a module that no rule names keeps
    diffusers' name.
    """
    names = {native: _parts(targets, modules, component) for native, targets in _expand(rules, modules)}
    named = {part.module for parts in names.values() for part in parts}
    for path in modules:
        if f"{component}.{path}" not in named:
            names[path] = whole(f"{component}.{path}")
    return names


def by(*rules: Rule) -> "Naming":
    """Make the naming of a transformer from rules."""
    return lambda modules: apply(rules, modules, "transformer")


def inside(blocks: Iterable[tuple[str, str]], layers: Iterable[tuple[str, ...]]) -> tuple[Rule, ...]:
    """Make the rules of layers inside blocks.

    Args:
        blocks: The native prefix of each list of blocks, and diffusers'.
        layers: Rules for the paths behind the prefixes.
    """
    kept = tuple(layers)
    return tuple(
        (own + native, *(name if name == SWAP else theirs + name for name in targets))
        for own, theirs in blocks
        for native, *targets in kept
    )


def same(modules: Mapping[str, Shape]) -> Mapping[str, Parts]:
    """Name the weights of a transformer whose own code has diffusers' names."""
    return {path: whole(f"transformer.{path}") for path in modules}


def _expand(rules: Iterable[Rule], modules: Mapping[str, Shape]) -> Iterator[tuple[str, tuple[str, ...]]]:
    blocks = 1 + max((int(part) for path in modules for part in path.split(".") if part.isdigit()), default=0)
    for native, *targets in rules:
        for i in range(blocks) if "{i}" in native else (0,):
            paths = tuple(target.format(i=i) for target in targets)
            if paths[0] in modules:
                yield native.format(i=i), paths


def _parts(targets: tuple[str, ...], modules: Mapping[str, Shape], component: str) -> Parts:
    if targets[-1] == SWAP:
        return swapped(f"{component}.{targets[0]}", modules[targets[0]][0])
    if len(targets) == 1:
        return whole(f"{component}.{targets[0]}")
    return stacked((f"{component}.{path}", modules[path][0]) for path in targets)
