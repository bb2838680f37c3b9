"""The arguments that a pipeline of diffusers draws with, its own values for them, and its pictures or frames."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..tensors import Array

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling options; None for guidance, height or width takes the pipeline's default."""

    steps: int = 30
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    frames: int | None = None
    """Frames of a pipeline for videos; None is 1, a picture."""

    def __post_init__(self) -> None:
        sides = [side for side in (self.height, self.width) if side is not None]
        if self.steps < 1 or any(side < 1 for side in sides):
            raise OptionError(f"Can't draw with {self}: wanted 1 step or more, and sides of 1 pixel or more.")
        if self.frames is not None and self.frames < 1:
            raise OptionError(f"Can't draw {self.frames} frames: wanted 1 or more.")


def settled(pipe: Any, sampling: Sampling) -> dict[str, Any]:
    """Return the values that a pipeline draws with, as recipes have them.

    Raises:
        OptionError: The pipeline draws from more than a prompt, or doesn't take an option.
    """
    takes = _takes(pipe)
    name = _guidance(pipe)
    guidance = float(takes[name].default if sampling.guidance is None else sampling.guidance)
    negative = sampling.negative_prompt
    if negative is not None and "negative_prompt" not in takes:
        raise OptionError(f"A {type(pipe).__name__} takes no negative prompt. Way out: none (no --negative).")
    if negative is not None and name == "guidance_scale" and "true_cfg_scale" in takes:
        raise OptionError(
            f"A {type(pipe).__name__} reads the negative prompt only with true_cfg_scale, which isn't given here. "
            "Way out: none (no --negative)."
        )
    if negative is None and name == "true_cfg_scale" and guidance > 1:
        negative = " "  # without one these pipelines would leave the guidance out
    found = {
        "steps": sampling.steps,
        "guidance": guidance,
        "height": sampling.height,
        "width": sampling.width,
        "negative_prompt": negative,
    }
    if "num_frames" in takes:
        return found | {"frames": _frames(pipe, sampling)}
    if sampling.frames is not None:
        raise OptionError(
            f"A {type(pipe).__name__} draws pictures, not videos. Way out: no number of frames (--frames)."
        )
    return found


def _takes(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a pipeline that draws from a prompt alone."""
    takes = inspect.signature(pipe.__call__).parameters
    needed = [name for name, p in takes.items() if p.default is inspect.Parameter.empty and p.kind is not p.VAR_KEYWORD]
    if needed or "prompt" not in takes:
        raise OptionError(
            f"A {type(pipe).__name__} draws from more than a prompt ({', '.join(needed) or 'it takes none'}). Wanted a "
            "pipeline from text to pictures. Way out: draw with diffusers; within "
            "'with loramerge.diffusion.applied(pipe, [(lora, 1.0)])' the LoRAs are loaded and checked."
        )
    return takes


def _guidance(pipe: Any) -> str:
    """Return the name of the scale of guidance: where the usual one is for a distilled model only, the true one."""
    takes = _takes(pipe)
    for name in ("guidance_scale", "true_cfg_scale"):
        if name in takes and takes[name].default is not None:
            return name
    raise OptionError(f"A {type(pipe).__name__} takes no scale of guidance, so it isn't one that is drawn with here.")


def _frames(pipe: Any, sampling: Sampling) -> int:
    frames, factor = sampling.frames or 1, int(getattr(pipe, "vae_scale_factor_temporal", 1))
    if (frames - 1) % factor:
        raise OptionError(
            f"A {type(pipe).__name__} draws 1 frame and then {factor} at a time, so not {frames}. "
            f"Way out: {frames - (frames - 1) % factor}."
        )
    return frames


def drawn(
    pipe: Any, prompts: Sequence[str], generators: Sequence["torch.Generator"], sampling: Mapping[str, Any]
) -> tuple[list[Array], Sequence[bool]]:
    """Draw one picture per prompt.

    Args:
        pipe: The pipeline.
        prompts: One per picture.
        generators: One per picture.
        sampling: The result of `settled`.

    Returns:
        For each prompt its frames, ``(frames, height, width, 3)`` in [0, 1], of which a picture has one; and whether the
        pipeline's safety checker hid it, or nothing if it has none.
    """
    sides = {name: sampling[name] for name in ("height", "width") if sampling[name] is not None}
    frames = {"num_frames": sampling["frames"]} if "frames" in sampling else {}
    negative = sampling["negative_prompt"]
    result = pipe(
        prompt=list(prompts),
        generator=list(generators),
        num_inference_steps=sampling["steps"],
        output_type="np",
        **{_guidance(pipe): sampling["guidance"]},
        **sides,
        **frames,
        **({} if negative is None else {"negative_prompt": [negative] * len(prompts)}),
    )
    pictures = list(result.frames) if frames else [picture[None] for picture in result.images]
    return pictures, result.get("nsfw_content_detected") or []
