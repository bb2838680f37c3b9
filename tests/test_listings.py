"""Real files' keys: every one is read, and goes back as it was."""

from dataclasses import replace

import numpy as np
import pytest

from listings import NAMES, config, filled, listing
from loramerge.errors import NoFactorsError
from loramerge.files.dialects import DIALECTS
from loramerge.files.lora import LoRA, from_tensors
from loramerge.tensors import Held
from loramerge.testing import relative_error

FOUND = {
    "flux_bfl_diffusion_model_peft": ("flux", "comfyui", 418),
    "flux_control_bfl": ("flux", "native", 656),
    "flux_diffusers": ("flux", "diffusers-peft", 494),
    "flux_kohya": ("flux", "kohya", 494),
    "flux_xlabs": ("flux", "xlabs", 24),
    "qwen_diffusers_updown": ("flux", "bare", 3),
    "qwen_image_musubi": ("qwen-image", "kohya", 840),
    "sd15_catundchat_diffusers_old_bare": ("sd15", "diffusers-old", 128),
    "sd15_cloneofsimo_analog_svd_rank4": ("sd15", "cloneofsimo", 192),
    "sd15_haseebae_diffusers_old_unet": ("sd15", "diffusers-old", 128),
    "sd15_hyper07_peft_base_model": ("sd15", "peft", 128),
    "sd15_kohya_lora_r4a1": ("sd15", "kohya-diffusers", 264),
    "sd21_vfph55_diffusers_new_bf16": ("sd21", "diffusers", 128),
    "sd3m_kohya_te12": ("sd3-medium", "kohya", 597),
    "sdxl_diffusers_broken_kohya_export": ("sdxl", "kohya-broken", 736),
    "sdxl_diffusers_new_te": ("sdxl", "diffusers", 736),
    "sdxl_diffusers_peft_te": ("sdxl", "diffusers-peft", 736),
    "sdxl_kohya_c3lier_unet": ("sdxl", "kohya", 788),
    "sdxl_kohya_lora_r16a8": ("sdxl", "kohya", 986),
    "sdxl_lycoris_dora_out": ("sdxl", "kohya", 788),
    "sdxl_lycoris_locon_tucker": ("sdxl", "kohya", 788),
    "sdxl_lycoris_loha": ("sdxl", "kohya", 1052),
    "sdxl_lycoris_lokr_full_factor8": ("sdxl", "kohya", 1052),
    "sdxl_srikanth_diffusers_old_truncated": ("sdxl", "diffusers-old", 560),
}
TARGETS = {"flux": "comfyui", "qwen-image": "diffusers-peft"}
WRITTEN = [name for name, (_, dialect, _) in FOUND.items() if DIALECTS[dialect].writes]


ALIKE = {
    "flux_bfl_diffusion_model_peft": ("chroma",),
    "flux_diffusers": ("longcat-image",),
    "qwen_diffusers_updown": ("qwen-image", "flux2-klein-4b", "hunyuanvideo", "chroma", "longcat-image", "ovis-image"),
    "sdxl_kohya_c3lier_unet": ("kolors",),
    "sdxl_lycoris_dora_out": ("kolors",),
    "sdxl_lycoris_locon_tucker": ("kolors",),
    "sdxl_srikanth_diffusers_old_truncated": ("kolors",),
}
"""Other families that the layers may be for, where the file doesn't tell."""


def read(name: str, architecture: str | None = None) -> LoRA:
    tensors = {key: Held(array) for key, array in filled(name).items()}
    metadata = listing(name).get("metadata") or {}
    return from_tensors(tensors, metadata, name, config=config(name), architecture=architecture)


def sample(lora: LoRA) -> list[str]:
    modules = list(lora)
    return modules[:: max(1, len(modules) // 8)]


def delta(lora: LoRA, module: str) -> np.ndarray | None:
    try:
        return lora[module].delta()
    except NoFactorsError:
        return None


def test_every_listing_has_its_expectation() -> None:
    assert sorted(FOUND) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_listing_is_recognised_whole(name: str) -> None:
    lora = read(name)

    assert (lora.architecture, lora.dialect, len(lora)) == FOUND[name]
    assert lora.alike == ALIKE.get(name, ())
    assert not lora.extras
    assert not lora.notes


@pytest.mark.parametrize("name", [name for name in NAMES if not config(name)])
def test_a_listing_goes_back_to_its_own_dialect_unchanged(name: str) -> None:
    before = filled(name)

    after = read(name).state_dict()

    assert list(after) == list(before)
    for key, tensor in after.items():
        assert tensor.shape == before[key].shape
        assert str(tensor.dtype).removeprefix("torch.") == before[key].dtype.name
        assert tensor.float().numpy().tobytes() == before[key].astype(np.float32).tobytes()


@pytest.mark.parametrize("name", [name for name in NAMES if config(name)])
def test_a_scale_from_a_configuration_goes_into_a_state_dict(name: str) -> None:
    before, lora = filled(name), read(name)

    after = lora.state_dict()

    assert {k: (t.shape, str(t.dtype)) for k, t in after.items()} == {
        k: (a.shape, f"torch.{a.dtype.name}") for k, a in before.items()
    }
    again = from_tensors({key: Held(tensor.numpy()) for key, tensor in after.items()}, {}, name)
    for module in sample(lora):
        assert relative_error(again[module].delta(), lora[module].delta()) <= 1e-6


@pytest.mark.parametrize("name", WRITTEN)
def test_our_own_names_are_the_trainers_names(name: str) -> None:
    lora = replace(read(name), origin=None)
    shapes = {key: tuple(shape) for key, shape in listing(name)["keys"].items()}

    written = {key: tuple(tensor.shape) for key, tensor in lora.state_dict().items()}

    assert written == shapes


@pytest.mark.parametrize("name", NAMES)
def test_a_listing_keeps_its_update_in_every_dialect_that_can_hold_it(name: str) -> None:
    lora = read(name, FOUND[name][0])
    modules = sample(lora)
    part = replace(lora.select(*modules), name=name)
    target = TARGETS.get(lora.architecture or "", "kohya")
    if name == "flux_control_bfl":
        part = part.select("*to_*")

    again = from_tensors(
        {k: Held(t) for k, t in part.state_dict(target).items()}, {}, name, architecture=lora.architecture
    )

    for module in part:
        before = delta(part, module)
        if before is not None:
            assert relative_error(again[module].delta(), before) < 2e-7
