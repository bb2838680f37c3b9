"""Closed forms on LoRAs that were really trained, a little: better than the sum on data that they have not seen."""

from typing import Any

import pytest
import tiny
import torch

import loramerge as lm
from loramerge import LoRA
from loramerge.diffusion import Denoiser, Images, from_images, load
from loramerge.learned.attach import attach
from loramerge.learned.calibration import calibrate
from loramerge.learned.least_squares import lsq


def train(denoiser: Denoiser, draw: Images, which: int, steps: int = 60) -> LoRA:
    """A LoRA that has learned, a little, to answer its own noised pictures by a pattern of its own."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = denoiser.model
    torch.manual_seed(which)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    adam = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(which)
    pattern = torch.randn(4, 8, 8, generator=generator)
    for _ in range(steps):
        drawn = draw(which, generator, 4)
        adam.zero_grad()
        (denoiser.predict(drawn) - pattern).square().mean().backward()
        adam.step()
    state = {f"unet.{key}": value.clone() for key, value in get_peft_model_state_dict(unet).items()}
    denoiser.pipe.unload_lora_weights()
    return lm.load(state, architecture="sd15")


def error(denoiser: Denoiser, draw: Images, both: list[LoRA], merged: LoRA) -> float:
    """Mean ‖ε − εᵢ‖² / ‖εᵢ − ε_base‖² on new examples."""
    total = 0.0
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for i, lora in enumerate(both):
            given = draw(i, generator, 8)
            base = denoiser.predict(given)
            wanted, found = (with_lora(denoiser, one, given) for one in (lora, merged))
            total += float((found - wanted).square().mean() / (wanted - base).square().mean()) / len(both)
    return total


def with_lora(denoiser: Denoiser, lora: LoRA, given: Any) -> torch.Tensor:
    with attach(denoiser.models, [lora]):
        return denoiser.predict(given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Denoiser, Images, list[LoRA]]:
    denoiser = load(tiny.pipeline("sd15"), device="cpu")
    place = tmp_path_factory.mktemp("data")
    folders = [tiny.images(place / str(i), prompt, seed=i) for i, prompt in enumerate(tiny.PROMPTS)]
    draw = from_images(denoiser, folders)
    return denoiser, draw, [train(denoiser, draw, which) for which in range(2)]


@pytest.mark.parametrize(("granularity", "kind"), [("core", "core"), ("column", "gram")])
def test_a_closed_form_fits_better_than_the_sum_and_the_average(
    trained: tuple[Denoiser, Images, list[LoRA]], granularity: Any, kind: Any
) -> None:
    denoiser, draw, both = trained
    moments = calibrate(denoiser.predict, denoiser.models, both, draw, kind=kind, batches=24)
    merged, report = lsq(both, moments, granularity=granularity)
    found = error(denoiser, draw, both, merged)
    plain, average = (error(denoiser, draw, both, lm.merge(both, weights=[w, w])) for w in (1.0, 0.5))

    assert found < 0.75 * plain, (found, plain, average)
    assert found < average, (found, plain, average)
    assert sum(report.fits.values()) < sum(report.sums.values())
