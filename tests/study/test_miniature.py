"""The miniature SDXL: tokenizer, autoencoder, folder, and LoRAs on it."""

import string
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open

import loramerge as lm
from virtual_tryon import model
from virtual_tryon.tokenizer import MAX_LENGTH
from virtual_tryon.world import CONCEPTS, SCENES, caption, draw, prompt, sample

WEIGHTS = Path(model.__file__).with_name("weights") / "base"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def captions() -> list[str]:
    random = np.random.default_rng(8)
    return [caption(sample(random), random) for _ in range(5_000)]


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    random = np.random.default_rng(9)
    return model.as_tensor(np.stack([draw(sample(random)) for _ in range(60)]))


def test_captions_survive_the_tokenizer(miniature: StableDiffusionXLPipeline, captions: list[str]) -> None:
    names = [concept.identifier for concept in CONCEPTS.values()]
    for text in [*captions[:500], *names, *(prompt(scene) for scene in SCENES)]:
        for tokenizer in (miniature.tokenizer, miniature.tokenizer_2):
            back = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
            assert back.replace(" ", "") == text.lower().replace(" ", "")


def test_no_symbol_is_unknown(miniature: StableDiffusionXLPipeline) -> None:
    words = [
        f"{a}{b}" for a in string.ascii_letters + string.digits for b in string.ascii_lowercase + string.digits
    ] + list(string.punctuation)
    unknown = miniature.tokenizer.unk_token_id
    assert not [word for word in words if unknown in miniature.tokenizer(word).input_ids[1:-1]]


def test_every_caption_fits(miniature: StableDiffusionXLPipeline, captions: list[str]) -> None:
    first, second = model.token_ids(miniature, captions)

    assert first.shape == second.shape == (len(captions), MAX_LENGTH)


def test_a_prompt_that_is_too_long_is_refused(miniature: StableDiffusionXLPipeline) -> None:
    with pytest.raises(ValueError, match="more than 77"):
        model.token_ids(miniature, ["wall " * 80])


def test_token_ids_give_the_pipelines_own_embeddings(miniature: StableDiffusionXLPipeline) -> None:
    texts = [prompt("field"), "A photo of a red shirt."]
    states, _, pooled, _ = miniature.encode_prompt(texts, do_classifier_free_guidance=False)

    with torch.no_grad():
        found = model.encode(miniature.text_encoder, miniature.text_encoder_2, *model.token_ids(miniature, texts))

    torch.testing.assert_close(found, (states, pooled))


def test_the_shipped_autoencoder_keeps_27_decibels_and_gives_standard_latents(pictures: torch.Tensor) -> None:
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", dtype=torch.float32)

    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode()
        back = vae.decode(latents).sample

    error = (pictures - back).square().mean(dim=(1, 2, 3))
    assert 10 * torch.log10(4 / error).mean() > 27
    assert latents.mean().abs() < 0.1
    assert latents.std() == pytest.approx(1, abs=0.1)


def test_the_folder_is_small(folder) -> None:
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 15 * 2**20


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_unchanged_pipeline_loads_the_folder_and_draws_the_same(folder, guidance: float) -> None:
    theirs = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)

    one, two = (model.generate(p, ["a man"], seed=1, guidance=guidance, steps=3) for p in (theirs, model.load(folder)))

    assert one.shape == (1, 96, 96, 3)
    np.testing.assert_array_equal(one, two)


def test_saving_leaves_the_pipeline_as_it_was(miniature: StableDiffusionXLPipeline, tmp_path) -> None:
    before = miniature.unet.conv_in.weight.clone()

    model.save(miniature, tmp_path)

    assert torch.equal(miniature.unet.conv_in.weight, before)


def test_an_odd_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        model.build(40)


def test_a_lora_of_the_miniature_maps_to_kohyas_names_and_back(
    miniature: StableDiffusionXLPipeline, folder, tmp_path
) -> None:
    pipeline = model.load(folder)
    lora = random_lora(pipeline, tmp_path)
    trained = velocity(pipeline)

    kohya = lm.save(lm.load(lora, architecture="sdxl"), tmp_path / "kohya.safetensors", dialect="kohya")

    with safe_open(kohya, "np") as file:
        downs = [key for key in file.keys() if key.endswith(".lora_down.weight")]  # noqa: SIM118
    assert len(downs) == 88
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in downs
    assert "lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_v.lora_down.weight" in downs
    again = lm.load(kohya, architecture="sdxl")
    assert {name: layer.shape for name, layer in again.items()} == {
        name: layer.shape for name, layer in lm.load(lora).items()
    }
    fresh = model.load(folder)
    fresh.load_lora_weights(kohya)
    torch.testing.assert_close(velocity(fresh), trained, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(velocity(miniature), trained, atol=1e-2)


def random_lora(pipeline: StableDiffusionXLPipeline, folder):
    """Trained as diffusers' script would, with random values, and saved as it does."""
    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION))
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name="lora.safetensors")
    return folder / "lora.safetensors"


@torch.no_grad()
def velocity(pipeline: StableDiffusionXLPipeline) -> torch.Tensor:
    noise = torch.randn(1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    states, projection = model.encode(
        pipeline.text_encoder, pipeline.text_encoder_2, *model.token_ids(pipeline, ["a man"])
    )
    sizes = torch.tensor([[96.0, 96, 0, 0, 96, 96]])
    return pipeline.unet(noise, 500, states, added_cond_kwargs={"text_embeds": projection, "time_ids": sizes}).sample
