"""Models of diffusers as functions: held against diffusers and PEFT themselves, on tiny pipelines of random weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import loramerge as lm
from loramerge import LoRA
from loramerge.diffusion import Denoiser, from_images, from_prompts, load, schedules
from loramerge.errors import FileError, MergeError, OptionError
from loramerge.learned.attach import attach
from loramerge.learned.batches import Batch
from loramerge.learned.columns import Learned, join, settings, ziplora

FAMILIES = list(tiny.BUILDERS)
QUICK = {"steps": 3, "calibration": 2}


def model(architecture: str, **options: Any) -> Denoiser:
    return load(tiny.pipeline(architecture), device="cpu", **options)


def loras(architecture: str) -> list[LoRA]:
    return [tiny.lora(architecture, 1), tiny.lora(architecture, 2, rank=3)]


def folders(path: Path) -> list[Path]:
    return [tiny.images(path / str(i), prompt, seed=i) for i, prompt in enumerate(tiny.PROMPTS)]


def batch(denoiser: Denoiser, rows: int = 2, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, *denoiser.latent_shape(tiny.SIDE), generator=generator)
    place = denoiser.placed_at([((24, 20), (1, 2), tiny.SIDE)] * rows)
    conditions = {**denoiser.encoded(tiny.PROMPTS[:rows]), **place}
    return {"sample": sample, "timestep": torch.tensor([300, 700][:rows]), "conditions": conditions}


@contextmanager
def by_peft(pipe: Any, source: object) -> Iterator[None]:
    """A LoRA in a pipeline, the official way."""
    pipe.load_lora_weights(source, adapter_name="oracle")
    try:
        yield
    finally:
        pipe.unload_lora_weights()


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_each_row_gets_what_peft_computes_with_its_lora(architecture: str) -> None:
    denoiser, both = model(architecture), loras(architecture)
    given = batch(denoiser)
    with torch.no_grad(), attach(denoiser.models, both) as attachment:
        found = denoiser.predict(attachment.only(torch.tensor([0, 1])) and given)
    base = denoiser.predict(given).detach()

    for row, lora in enumerate(both):
        with torch.no_grad(), by_peft(denoiser.pipe, lora.state_dict("diffusers-peft")):
            wanted = denoiser.predict(given)[row]
        assert difference(found[row], wanted) < 1e-5
        assert difference(base[row], wanted) > 1e-2


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_merge_in_a_plain_pipeline_is_the_student(architecture: str, tmp_path: Path) -> None:
    denoiser, both = model(architecture), loras(architecture)
    draw = from_images(denoiser, folders(tmp_path), resolution=tiny.SIDE)
    learned = ziplora(denoiser.predict, denoiser.models, both, draw, settings(**QUICK))
    path = lm.save(learned.lora, tmp_path / "zipped.safetensors", dialect="diffusers-peft")
    given = batch(denoiser)
    with torch.no_grad():
        student = as_student(denoiser, both, learned, given)
        with by_peft(denoiser.pipe, path):
            found = denoiser.predict(given)
        with by_peft(denoiser.pipe, lm.merge(both, weights=[1, 1]).state_dict("diffusers-peft")):
            plain = denoiser.predict(given)

    assert difference(found, student) < 1e-5
    assert difference(plain, student) > 1e-3


def as_student(denoiser: Denoiser, both: list[LoRA], learned: Learned, given: Batch) -> Tensor:
    """What the LoRAs say with their coefficients, without the merged file."""
    assert learned.coefficients is not None
    with attach(denoiser.models, both) as attachment:
        for module, site in attachment.sites.items():
            m = torch.as_tensor(learned.coefficients.columns[module].read())
            attachment.downs[module] = site.down * m[site.owner]
        return denoiser.predict(given)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_trajectories_are_what_the_denoiser_sees_in_the_pipeline(architecture: str) -> None:
    denoiser, both = model(architecture), loras(architecture)
    draw = from_prompts(denoiser, both, tiny.PROMPTS, steps=3, trajectories=1, seed=4, resolution=tiny.SIDE)
    generator = torch.Generator().manual_seed(4)
    for i, lora in enumerate(both):
        noise = torch.randn((1, *denoiser.latent_shape(tiny.SIDE)), generator=generator)
        with by_peft(denoiser.pipe, lora.state_dict("diffusers-peft")):
            seen = inputs_of(denoiser, tiny.PROMPTS[i], noise)

        assert len(seen) == 3
        for k, (sample, timestep) in enumerate(seen):
            assert difference(draw.samples[i][k], sample[-1]) < 1e-5  # without the prompt first, with it second
            assert float(draw.timesteps[i][k]) == pytest.approx(in_steps(denoiser, timestep), abs=1e-3)


def in_steps(denoiser: Denoiser, time: Tensor) -> float:
    """The timestep in [0, 1000] of what the denoiser is given as the time."""
    flow, value = denoiser.family.flow, float(time.flatten()[0])
    clock = flow.clock if flow else "timestep"
    return {"timestep": value, "sigma": 1000 * value, "signal": 1000 * (1 - value)}[clock]


def inputs_of(denoiser: Denoiser, prompt: str, noise: Tensor, steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Return the denoiser's arguments for the prompt while the pipeline makes an image."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *(kwargs[name] for name in ("hidden_states", "timestep") if name in kwargs)]
        sample = given[0][0][None] if isinstance(given[0], list) else given[0]
        if not len(seen) or float(given[1].flatten()[0]) != float(seen[-1][1].flatten()[0]):  # not that of no prompt
            seen.append((sample.clone(), given[1]))

    handle = denoiser.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        drawn(denoiser, prompt, noise, steps)
    finally:
        handle.remove()
    return seen


def drawn(denoiser: Denoiser, prompt: str, noise: Tensor, steps: int = 3) -> Tensor:
    """The latents that the pipeline makes of noise in the denoiser's form, at the family's guidance."""
    pipe = denoiser.pipe
    guidance = {"guidance_scale": denoiser.family.guidance}
    special: dict[str, dict[str, Any]] = {
        "FluxPipeline": {"guidance_scale": 3.5},
        "QwenImagePipeline": {"true_cfg_scale": denoiser.family.guidance, "negative_prompt": ""},
        "ZImagePipeline": {"guidance_scale": 0.0},
        "WanPipeline": {"num_frames": 1, **guidance},
    }
    if "Flux2" in type(pipe).__name__:
        noise = noise.transpose(1, 2).reshape(1, -1, *[int(noise.shape[1] ** 0.5)] * 2)
    if "ZImage" in type(pipe).__name__:
        noise = noise[:, :, 0]
    more = special.get(type(pipe).__name__, guidance)
    sides = {"height": tiny.SIDE, "width": tiny.SIDE}
    found = pipe(prompt=prompt, **sides, latents=noise, num_inference_steps=steps, output_type="latent", **more)
    return found[0]


def test_pictures_are_encoded_and_placed_as_the_pipeline_does(tmp_path: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    denoiser = model("sdxl")
    [folder] = folders(tmp_path)[:1]
    draw = from_images(denoiser, [folder])

    image = Image.open(folder / "0.png").resize((16, 19), Image.Resampling.LANCZOS).crop((0, 1, 16, 17))
    pixels = VaeImageProcessor().preprocess(image)
    vae = denoiser.pipe.vae
    for k, view in enumerate((pixels, pixels.flip(-1))):
        wanted = vae.encode(view).latent_dist.mode() * vae.config.scaling_factor
        assert difference(draw.latents[0][0, k], wanted[0]) < 1e-5
    ids = denoiser.pipe._get_add_time_ids((24, 20), (1, 0), (16, 16), torch.float32, 8)
    assert torch.equal(draw.conditions[0].places["time_ids"][0], ids[0])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_noise_is_added_as_in_training(architecture: str, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler

    denoiser = model(architecture)
    schedule, config = denoiser.schedule(tiny.SIDE), denoiser.pipe.scheduler.config
    latents, noise = torch.randn(2, 5, *denoiser.latent_shape(tiny.SIDE))
    timesteps = schedule.timesteps(5, torch.Generator().manual_seed(0))
    found = schedule.noised(latents, noise, timesteps)

    if denoiser.family.flow:
        scheduler = type(denoiser.pipe.scheduler).from_config(config)
        scheduler.set_timesteps(1000, mu=0.5)
        near = scheduler.timesteps[(scheduler.timesteps[:, None] - timesteps).abs().argmin(0)]
        noising = getattr(scheduler, "scale_noise", None)
        wanted = noising(latents, near, noise) if noising else scheduler.add_noise(latents, noise, near)
        rounding = 1e-3 if near.dtype == torch.int64 else 1e-5  # UniPC's timesteps are whole numbers
        assert difference(schedule.noised(latents, noise, near), wanted) < rounding
    else:
        assert difference(found, DDPMScheduler.from_config(config).add_noise(latents, noise, timesteps)) < 1e-6


@pytest.mark.parametrize("architecture", ["sd15", "sd21"])
def test_min_snr_weights_are_those_of_diffusers_script(architecture: str) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    denoiser = model(architecture)
    config = denoiser.pipe.scheduler.config
    timesteps = torch.tensor([0, 10, 500, 999])
    snr = compute_snr(DDPMScheduler.from_config(config), timesteps)
    base = snr + 1 if config.prediction_type == "v_prediction" else snr
    wanted = torch.stack([snr, torch.full_like(snr, 5.0)]).min(0).values / base

    assert torch.allclose(denoiser.schedule(tiny.SIDE).weights(timesteps, 5.0), wanted)


def test_weights_of_examples_scale_their_squared_error(tmp_path: Path) -> None:
    denoiser, both = model("sd15"), loras("sd15")
    plain = from_images(denoiser, folders(tmp_path))

    def fourfold(lora: int, generator: torch.Generator, count: int) -> Batch:
        drawn = plain(lora, generator, count)
        return {**drawn, "weight": torch.full((count,), 4.0)}

    def losses(draw: Any, loss: str) -> list[float]:
        chosen = settings(steps=1, loss=loss, init="ones", calibration=2)
        learned = ziplora(denoiser.predict, denoiser.models, both, draw, chosen)
        return [step.loss for step in learned.history]

    assert losses(fourfold, "mse") == pytest.approx([4 * x for x in losses(plain, "mse")])
    assert losses(fourfold, "norm") == pytest.approx([2 * x for x in losses(plain, "norm")])
    assert losses(fourfold, "normalised") == pytest.approx(losses(plain, "normalised"))


def test_a_seed_gives_the_same_examples(tmp_path: Path) -> None:
    denoiser = model("sdxl")
    draw = from_images(denoiser, folders(tmp_path), snr_gamma=5.0)
    first, again, other = (draw(0, torch.Generator().manual_seed(seed), 3) for seed in (0, 0, 1))

    assert torch.equal(first["sample"], again["sample"])
    assert torch.equal(first["weight"], again["weight"])
    assert not torch.equal(first["sample"], other["sample"])


def test_a_lora_acts_in_the_text_encoders_where_that_is_asked_for(tmp_path: Path) -> None:
    """transformers 5 leaves out text_model. in one class: the LoRA's names fit all the same."""
    more = {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj": (8, 8),
        "text_encoder_2.text_model.encoder.layers.1.self_attn.out_proj": (8, 8),
    }
    lora, other = tiny.lora("sdxl", 1, more=more), tiny.lora("sdxl", 2)
    denoiser = model("sdxl", text_encoders=True)
    draw = from_images(denoiser, folders(tmp_path))
    given = draw(0, torch.Generator().manual_seed(0), 2)
    with torch.no_grad(), attach(denoiser.models, [lora, other]) as attachment:
        attachment.only(torch.tensor([0, 0]))
        found = denoiser.predict(given)
    with torch.no_grad(), by_peft(denoiser.pipe, lora.state_dict("diffusers-peft")):
        wanted = denoiser.predict(given)
    with torch.no_grad(), by_peft(denoiser.pipe, lora.select("unet").state_dict("diffusers-peft")):
        without = denoiser.predict(given)

    assert difference(found, wanted) < 1e-5
    assert difference(without, wanted) > 1e-4


def test_trajectories_are_made_with_the_text_encoders_too() -> None:
    module = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
    lora = tiny.lora("sd15", 1, more={module: (8, 8)})
    found = []
    for text_encoders in (True, False):
        draw = from_prompts(model("sd15", text_encoders=text_encoders), [lora], ["a person"], steps=2, trajectories=1)
        found.append(draw.samples[0])
    denoiser = model("sd15")
    noise = torch.randn((1, *denoiser.latent_shape(tiny.SIDE)), generator=torch.Generator().manual_seed(0))
    with by_peft(denoiser.pipe, lora.state_dict("diffusers-peft")):
        seen = inputs_of(denoiser, "a person", noise, steps=2)

    assert difference(found[0][1], seen[1][0][-1]) < 1e-5
    assert difference(found[1][1], seen[1][0][-1]) > 1e-4


def test_where_the_pipeline_gives_zeros_for_no_prompt_so_do_trajectories(tmp_path: Path) -> None:
    lora, found = loras("sdxl")[0], []
    for text_encoders in (True, False):
        denoiser = model("sdxl", text_encoders=text_encoders)
        assert denoiser.pipe.config.force_zeros_for_empty_prompt
        draw = from_prompts(denoiser, [lora], ["a person"], steps=2, trajectories=1, guidance=5.0)
        found.append(draw.samples[0])

    assert difference(*found) < 1e-5


@pytest.mark.parametrize("shift", ["linear", "exponential"])
def test_a_flows_shift_is_that_of_its_scheduler(shift: str) -> None:
    pipe = tiny.pipeline("flux")
    pipe.scheduler.register_to_config(time_shift_type=shift, use_dynamic_shifting=True)
    tokens = 64
    found = schedules.schedule(pipe, True, tokens).shift

    pipe.scheduler.set_timesteps(sigmas=[0.5], mu=schedules.shift(pipe, tokens))
    assert found * 0.5 / (1 + (found - 1) * 0.5) == pytest.approx(float(pipe.scheduler.sigmas[0]), rel=1e-5)


def test_a_prediction_of_the_picture_itself_is_refused() -> None:
    pipe = tiny.pipeline("sd15")
    pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, "prediction_type": "sample"})
    with pytest.raises(OptionError, match="predicts 'sample'"):
        schedules.schedule(pipe, False, 64)


def test_modules_of_text_encoders_are_summed_otherwise(tmp_path: Path) -> None:
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    both = [tiny.lora("sd15", seed, more={module: (8, 8)}) for seed in (1, 2)]
    denoiser = model("sd15")
    draw = from_prompts(denoiser, both, tiny.PROMPTS, steps=2, trajectories=1)
    learned = ziplora(denoiser.predict, denoiser.models, both, draw, settings(**QUICK))

    wanted = lm.merge(both, weights=[1, 1])[module].delta()
    assert abs(learned.lora[module].delta() - wanted).max() < 1e-5


def test_the_text_encoders_and_the_vae_can_be_let_go(tmp_path: Path) -> None:
    denoiser, both = model("sdxl"), loras("sdxl")
    draw = from_images(denoiser, folders(tmp_path))
    denoiser.release()

    assert denoiser.pipe.vae is None
    assert not denoiser.encoders
    assert ziplora(denoiser.predict, denoiser.models, both, draw, settings(**QUICK)).history


@pytest.mark.parametrize("architecture", ["sdxl", "sd3-medium"])
def test_gradient_checkpointing_changes_nothing_but_memory(architecture: str, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        denoiser = model(architecture, checkpointing=checkpointing)
        draw = from_images(denoiser, folders(tmp_path))
        found.append(ziplora(denoiser.predict, denoiser.models, loras(architecture), draw, settings(**QUICK)))
    plain, checkpointed = ([step.loss for step in learned.history] for learned in found)
    assert checkpointed == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"dtype": "fp32", "autocast": "bf16"}])
def test_bf16_predicts_nearly_what_fp32_does_and_learns_in_fp32(options: dict[str, str], tmp_path: Path) -> None:
    exact, half = model("sdxl"), model("sdxl", **options)
    given = batch(exact)
    with torch.no_grad():
        assert 1e-4 < difference(half.predict(given).float(), exact.predict(given)) < 0.1
    draw = from_images(half, folders(tmp_path))
    learned = ziplora(half.predict, half.models, loras("sdxl"), draw, settings(**QUICK, init="ones"))

    assert learned.coefficients is not None
    columns = [array.read() for array in learned.coefficients.columns.values()]
    assert all(1e-4 < abs(array - 1).max() < 0.05 for array in columns)  # steps that bf16 would round away near 1


def test_fp16_is_refused_for_learning_only(tmp_path: Path) -> None:
    denoiser = model("sd15", autocast="fp16")
    given = batch(denoiser)
    with pytest.raises(OptionError, match="bf16"):
        denoiser.predict(given)
    with torch.no_grad():
        assert denoiser.predict(given).isfinite().all()


def test_a_lora_of_another_family_is_refused() -> None:
    denoiser = model("sd15")
    with pytest.raises(MergeError, match=r"a LoRA of sdxl.*StableDiffusionPipeline.*sd15 or sd21"):
        denoiser.check([tiny.lora("sdxl", 1)])
    unknown = tiny.lora("sd3-medium", 1)
    with pytest.raises(MergeError, match="is in the model's components unet"):
        from_prompts(denoiser, [unknown], ["a person"])


def test_active_peft_adapters_are_refused() -> None:
    denoiser, both = model("sd15"), loras("sd15")
    message = r"PEFT adapters are active.*unload them, or disable_adapters"
    with (
        by_peft(denoiser.pipe, both[0].state_dict("diffusers-peft")),
        pytest.raises(MergeError, match=message),
    ):
        from_prompts(denoiser, both, tiny.PROMPTS)


def test_what_can_not_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileError, match=r"Can't load the base model nobody/nothing.*network"):
        load("nobody/nothing")
    with pytest.raises(FileError, match=r"no model_index.json"):
        load(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(OptionError, match=r"from_single_file"):
        load(tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match=r"Unknown dtype 'int8'. Available: fp32, bf16, fp16"):
        model("sd15", dtype="int8")


def test_options_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    denoiser, both = model("sd3-medium"), loras("sd3-medium")
    places = folders(tmp_path)
    with pytest.raises(OptionError, match="multiple of 4, got 18"):  # its tokens are 2 × 2 latents
        from_images(denoiser, places, resolution=18)
    with pytest.raises(OptionError, match="this model is a flow"):
        from_images(denoiser, places, snr_gamma=5.0)
    with pytest.raises(OptionError, match="LoRAs: 2, prompts given for 1"):
        from_prompts(denoiser, both, ["a person"])


def test_batches_of_loras_lie_below_each_other(tmp_path: Path) -> None:
    draw = from_images(model("sdxl"), folders(tmp_path))
    generator = torch.Generator().manual_seed(0)
    whole = join([draw(i, generator, 2) for i in range(2)])

    assert len(whole["sample"]) == len(whole["conditions"]["pooled"]) == 4
