"""Transformers that predict a flow: what the adapter gives them and takes from them, held against diffusers' pipelines."""

from pathlib import Path
from typing import Any

import flows
import numpy as np
import pytest
import tiny
import torch
from commands import done
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import Tensor, nn

import loramerge as lm
from loramerge import LoRA
from loramerge.diffusion import (
    Sampling,
    TrainSettings,
    Use,
    draw,
    from_images,
    from_prompts,
    generate,
    load,
    train_lora,
)
from loramerge.diffusion.apply import applied
from loramerge.diffusion.generation import Drawn
from loramerge.diffusion.training.order import Order
from loramerge.errors import MergeError, OptionError
from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.architectures.labels import label_of
from loramerge.learned import calibrate, lsq, settings, ziplora
from loramerge.learned.attach import attach
from loramerge.scoring.png import recipe_in
from loramerge.testing import relative_error

NEW = list(flows.BUILDERS)
FLOWS = ["sd3-medium", "flux", *NEW]
LONG = " ".join(4 * ["a psq-person"])
"""A prompt of another length than the others."""


def linear(module: str) -> bool:
    """The modules of a LoRA on everything: without the embedder of Z-Image that is as wide in the tiny model."""
    return "t_embedder" not in module


def pieces(architecture: str) -> tuple[Any, list[LoRA]]:
    pipe = tiny.pipeline(architecture)
    return pipe, [tiny.lora(architecture, 1), tiny.lora(architecture, 2, rank=3)]


def called(pipe: Any, prompt: str | list[str], noise: Tensor | None = None) -> list[tuple[Any, Any, Tensor]]:
    """The latents, the time and the prediction of the pipeline's own passes for a prompt, without guidance."""
    seen: list[tuple[Any, Any, Tensor]] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        latents, time = [*args, *(kwargs[name] for name in ("hidden_states", "timestep") if name in kwargs)][:2]
        stacked = [torch.stack(x) if isinstance(x, list) else x for x in (latents, output[0])]
        seen.append((stacked[0].clone(), time, stacked[1].clone()))

    handle = pipe.transformer.register_forward_hook(look, with_kwargs=True)
    try:
        run(pipe, prompt, latents=noise)
    finally:
        handle.remove()
    return seen


def run(pipe: Any, prompt: str | list[str], steps: int = 2, **more: Any) -> Any:
    name = type(pipe).__name__
    off = {"FluxPipeline": 3.5, "Flux2Pipeline": 4.0, "ZImagePipeline": 0.0}.get(name, 1.0)
    guidance = {"true_cfg_scale": 1.0} if name == "QwenImagePipeline" else {"guidance_scale": off}
    frames = {"num_frames": 1} if name == "WanPipeline" else {}
    generator = torch.Generator().manual_seed(3)
    sides = {"height": tiny.SIDE, "width": tiny.SIDE}
    options = {"num_inference_steps": steps, "output_type": "latent", "generator": generator, **guidance, **frames}
    return pipe(**({} if prompt == "" else {"prompt": prompt}), **sides, **options | more)[0]


def timesteps(pipe: Any, time: Tensor) -> Tensor:
    clock = {"FluxPipeline": "sigma", "QwenImagePipeline": "sigma", "ZImagePipeline": "signal"}
    clock |= dict.fromkeys(("Flux2KleinPipeline", "Flux2Pipeline"), "sigma")
    return {"sigma": 1000 * time, "signal": 1000 - 1000 * time}.get(clock.get(type(pipe).__name__, ""), time)


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# ---- the denoiser as the pipeline calls it


@pytest.mark.parametrize("architecture", FLOWS)
def test_the_prediction_is_the_pipelines_own(architecture: str) -> None:
    """Also for prompts of several lengths in one batch, of which the pipeline got each alone."""
    pipe = tiny.pipeline(architecture)
    denoiser = load(pipe, device="cpu")
    prompts = [tiny.PROMPTS[0], LONG]
    conditions = denoiser.encoded(prompts)
    alone = [called(pipe, prompt) for prompt in prompts]

    for step in range(2):
        sample = torch.cat([seen[step][0] for seen in alone])
        time = timesteps(pipe, torch.cat([seen[step][1] for seen in alone]).reshape(2, -1)[:, 0])
        with torch.no_grad():
            found = denoiser.predict({"sample": sample, "timestep": time, "conditions": conditions})
        own = torch.cat([seen[step][2] for seen in alone])

        assert difference(found, -own if architecture == "z-image" else own) < 1e-5
        assert difference(own[0], own[1]) > 1e-3  # a prompt matters


def test_a_time_per_token_and_a_guidance_that_is_an_input_are_the_pipelines_own() -> None:
    wan = tiny.pipeline("wan-1.3b")
    wan.register_to_config(expand_timesteps=True)
    klein = tiny.pipeline("flux2-klein-4b")
    torch.manual_seed(0)
    dev = Flux2Pipeline(
        scheduler=klein.scheduler,
        vae=klein.vae,
        text_encoder=None,
        tokenizer=None,
        transformer=type(klein.transformer).from_config({**klein.transformer.config, "guidance_embeds": True}).eval(),
    )
    dev.set_progress_bar_config(disable=True)
    embeds = klein.encode_prompt(LONG)[0].detach()
    dev.encode_prompt = lambda prompt, **more: (embeds, klein._prepare_text_ids(embeds))

    for pipe in (wan, dev):
        denoiser = load(pipe, device="cpu")
        (sample, time, own), *_ = called(pipe, LONG)
        given = denoiser.encoded([LONG])
        with torch.no_grad():
            batch = {"sample": sample, "timestep": timesteps(pipe, time).reshape(1, -1)[:, 0], "conditions": given}
            assert difference(denoiser.predict(batch), own) < 1e-5


@pytest.mark.parametrize("architecture", FLOWS)
def test_latents_of_pictures_are_those_that_the_pipeline_decodes(architecture: str) -> None:
    """With a denoiser that predicts 0 the pipeline decodes the latents that it began with."""
    pipe = tiny.pipeline(architecture)
    pixels = torch.rand(1, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = load(pipe, device="cpu").encoded_image(pixels)
    video = architecture in ("wan-1.3b", "qwen-image")
    with torch.no_grad():
        plain = pipe.vae.encode(pixels[:, :, None] if video else pixels).latent_dist.mode()
    if architecture == "z-image":
        latents = latents[:, :, 0]
    if "flux2" in architecture:
        side = int(latents.shape[1] ** 0.5)
        latents = latents.transpose(1, 2).reshape(1, -1, side, side)

    forward, decode, seen = pipe.transformer.forward, pipe.vae.decode, []

    def still(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)[0]
        return ([torch.zeros_like(x) for x in found] if isinstance(found, list) else torch.zeros_like(found),)

    pipe.transformer.forward = still
    pipe.vae.decode = lambda latents, **more: seen.append(latents) or decode(latents, **more)
    run(pipe, LONG, latents=latents, output_type="np")

    assert difference(seen[0], plain) < 1e-5


@pytest.mark.parametrize("architecture", FLOWS)
def test_the_target_leads_the_scheduler_along_the_straight_line(architecture: str) -> None:
    """A step of the pipeline's scheduler with the target goes from x_σ to x_σ', for x_σ = (1 − σ) x₀ + σ ε."""
    denoiser = load(tiny.pipeline(architecture), device="cpu")
    schedule, scheduler = denoiser.schedule(tiny.SIDE), denoiser.pipe.scheduler
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1, *denoiser.latent_shape(tiny.SIDE), generator=generator).double()
    scheduler.set_timesteps(5, **({"mu": 0.7} if scheduler.config.get("use_dynamic_shifting") else {}))
    target = schedule.target(latents, noise, scheduler.timesteps[:1])

    assert torch.equal(target, noise - latents)
    sigma = scheduler.sigmas.double()
    at = (1 - sigma[0]) * latents + sigma[0] * noise
    for k, timestep in enumerate(scheduler.timesteps):
        at = scheduler.step(target, timestep, at).prev_sample
        assert difference(at, (1 - sigma[k + 1]) * latents + sigma[k + 1] * noise) < 1e-5
    exact = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noised = schedule.noised(latents, noise, exact.timesteps[500:501])
    assert difference(noised, exact.scale_noise(latents, exact.timesteps[500:501], noise)) < 1e-5


# ---- LoRAs in it


@pytest.mark.parametrize("architecture", NEW)
def test_diffusers_loads_a_lora_on_every_linear_layer_whole(architecture: str, tmp_path: Path) -> None:
    """No key is unexpected, none is missing, and each module's ΔW is ours: from all written dialects, through a file."""
    pipe, lora = tiny.pipeline(architecture), tiny.lora(architecture, 1, only=linear)
    assert set(lora) <= set(ARCHITECTURES[architecture].shapes)

    for dialect in ("diffusers-peft", "comfyui", "kohya"):
        there = lm.load(lm.save(lora, tmp_path / f"{dialect}.safetensors", dialect=dialect), architecture=architecture)
        assert there.dialect == dialect
        path = lm.save(there, tmp_path / "diffusers.safetensors", dialect="diffusers-peft")
        pipe.load_lora_weights(path, adapter_name="x")
        layers = {f"transformer.{n}": m for n, m in pipe.transformer.named_modules() if isinstance(m, LoraLayer)}

        assert layers.keys() == set(lora)
        for module, layer in layers.items():
            assert relative_error(layer.get_delta_weight("x").detach().numpy(), lora[module].delta()) <= 1e-5
        pipe.unload_lora_weights()


@pytest.mark.parametrize("architecture", NEW)
def test_a_lora_changes_a_prediction_as_it_does_in_the_pipeline(architecture: str) -> None:
    pipe, (lora, _) = pieces(architecture)
    denoiser = load(pipe, device="cpu")
    conditions = denoiser.encoded([tiny.PROMPTS[0]])
    with applied(pipe, [(lora, 0.8)]):
        (sample, time, own), *_ = called(pipe, tiny.PROMPTS[0])
    batch = {"sample": sample, "timestep": timesteps(pipe, time).reshape(1, -1)[:, 0], "conditions": conditions}
    with torch.no_grad():
        base = denoiser.predict(batch)
        with attach(denoiser.models, [lm.merge([lora], weights=[0.8])]):
            found = denoiser.predict(batch)

    own = -own if architecture == "z-image" else own
    assert difference(found, own) < 1e-5
    assert difference(base, own) > 1e-2


@pytest.mark.parametrize("architecture", NEW)
def test_learned_merges_fit_better_than_the_sum(architecture: str, tmp_path: Path) -> None:
    pipe, strong = pieces(architecture)
    denoiser, both = load(pipe, device="cpu"), [lm.merge([lora], weights=[0.3]) for lora in strong]
    folders = [tiny.images(tmp_path / str(i), prompt, seed=i) for i, prompt in enumerate([tiny.PROMPTS[0], LONG])]
    draw = from_images(denoiser, folders, resolution=tiny.SIDE)
    moments = calibrate(denoiser.predict, denoiser.models, both, draw, kind="gram", batches=4)
    closed, report = lsq(both, moments, granularity="column")
    learned = ziplora(
        denoiser.predict, denoiser.models, both, draw, settings(steps=6, init="ones", lr=0.05, calibration=2)
    )

    def loss(merged: LoRA) -> float:
        """Return the distance of the merge from each LoRA on new examples of it, in the end."""
        generator, total = torch.Generator().manual_seed(9), 0.0
        for i, lora in enumerate(both):
            given = draw(i, generator, 2)
            total += float((with_lora(merged, given) - with_lora(lora, given)).square().mean())
        return total

    def with_lora(lora: LoRA, given: Any) -> Tensor:
        with torch.no_grad(), attach(denoiser.models, [lora]):
            return denoiser.predict(given)

    start = loss(lm.merge(both, weights=[1, 1]))
    assert loss(closed) < start
    assert loss(learned.lora) < start
    assert sum(report.fits.values()) < sum(report.sums.values())


def test_a_negative_prompt_that_would_not_be_read_is_refused(tmp_path: Path) -> None:
    pipe = tiny.pipeline("flux")
    with pytest.raises(OptionError, match=r"reads the negative prompt only with true_cfg_scale.*no --negative"):
        generate(pipe, {"none": []}, [LONG], [0], tmp_path, sampling=Sampling(steps=1, negative_prompt="blurry"))
    assert not list(tmp_path.rglob("*.png"))


def test_guidance_begins_at_1_where_the_pipelines_begins_at_0() -> None:
    pipe, both = pieces("z-image")
    denoiser = load(pipe, device="cpu")
    draw = from_prompts(denoiser, both[:1], [LONG], steps=3, trajectories=1, guidance=3.0, resolution=tiny.SIDE, seed=4)
    noise = torch.randn(1, *denoiser.latent_shape(tiny.SIDE), generator=torch.Generator().manual_seed(4))
    seen: list[Tensor] = []
    pipe.transformer.register_forward_pre_hook(lambda module, given: seen.append(given[0][0].clone()))
    with applied(pipe, [(both[0], 1.0)]):
        run(pipe, LONG, steps=3, latents=noise[:, :, 0], guidance_scale=2.0)

    assert difference(draw.samples[0], torch.stack(seen)) < 1e-5


# ---- training


def plain_steps(pipe: Any, folder: Path, given: TrainSettings) -> dict[str, Tensor]:
    """The steps of a training written by hand, on the same random numbers."""
    transformer = pipe.transformer
    config = LoraConfig(
        r=given.rank,
        lora_alpha=given.rank,
        init_lora_weights="gaussian",
        target_modules=["to_k", "to_q", "to_v", "to_out.0"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(given.seed)
        inject_adapter_in_model(config, transformer)
    learning = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=given.learning_rate)
    order = Order(from_images(load(pipe), [folder], resolution=tiny.SIDE), given.seed)
    with torch.no_grad():
        text = pipe.encode_prompt(LONG, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    for step in range(given.steps):
        drawn = order.drawn(0, step)
        latents, noise = order.images.latents[0][drawn.picture, drawn.mirrored][None], drawn.noise[None]
        sigma = drawn.timestep[None] / 1000
        noisy = (1 - sigma) * latents + sigma * noise
        if isinstance(text, list):
            predicted = -torch.stack(transformer(list(noisy), 1 - sigma, text).sample)
        else:
            predicted = transformer(noisy, 1000 * sigma, text).sample
        loss = (predicted - (noise - latents)).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
    layers = {f"transformer.{n}": m for n, m in transformer.named_modules() if isinstance(m, LoraLayer)}
    return {module: layer.get_delta_weight("default").detach() for module, layer in layers.items()}


@pytest.mark.parametrize("architecture", ["wan-1.3b", "z-image"])
def test_training_steps_follow_the_flow(architecture: str, tmp_path: Path) -> None:
    folder = tiny.images(tmp_path / "photos", LONG)
    given = TrainSettings(rank=2, steps=3, learning_rate=1e-2, resolution=tiny.SIDE)

    found = train_lora(load(tiny.pipeline(architecture)), folder, settings=given)
    wanted = plain_steps(tiny.pipeline(architecture), folder, given)

    assert set(found) == set(wanted)
    for module, delta in wanted.items():
        assert relative_error(found[module].delta(), delta.numpy()) < 1e-3
    assert found.dialect == "diffusers-peft"
    assert found.metadata["modelspec.architecture"] == label_of(found.architecture).specifications[0] + "/lora"
    assert "modelspec.prediction_type" not in found.metadata


@pytest.mark.parametrize("architecture", NEW)
def test_every_linear_layer_of_the_blocks_can_be_trained_and_loaded(architecture: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline(architecture)
    folder = tiny.images(tmp_path / "photos", LONG, count=1)
    given = TrainSettings(rank=2, steps=1, resolution=tiny.SIDE, targets="transformers")
    drawn: list[Path] = []

    def look(step: Any) -> None:
        options: dict[str, Any] = {"sampling_steps": 2, "resolution": tiny.SIDE}
        drawn.extend(draw(denoiser, [LONG], tmp_path / "x.safetensors", step.step, **options))

    denoiser = load(pipe)
    lora = train_lora(denoiser, folder, settings=given, on_step=look)

    linear = {f"transformer.{n}" for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)}
    assert set(lora) == {module for module in linear if any(part.isdigit() for part in module.split(".")[1:-1])}
    assert Image.open(drawn[0]).size == (tiny.SIDE, tiny.SIDE)
    with applied(pipe, [(lora, 1.0)]):
        pass


# ---- drawing


def pixels(drawn: Drawn) -> np.ndarray:
    return np.asarray(Image.open(drawn.path)).astype(int)


@pytest.mark.parametrize("architecture", NEW)
def test_two_loras_draw_what_their_merge_draws_whatever_is_beside(architecture: str, tmp_path: Path) -> None:
    pipe, (first, second) = pieces(architecture)
    merged = lm.merge([first, second], weights=[3.0, 2.0])
    settings = {"none": [], "merged": [Use(merged)], "both": [Use(first, 3.0), Use(second, 2.0)]}
    prompts, sampling = [tiny.PROMPTS[0], LONG], Sampling(steps=2, guidance=1.0, height=tiny.SIDE, width=tiny.SIDE)

    found = generate(pipe, settings, prompts, 1, tmp_path / "together", sampling=sampling)
    alone = generate(pipe, {"merged": settings["merged"]}, prompts, 1, tmp_path / "alone", sampling=sampling, batch=1)

    none, sums, both = (
        np.stack([pixels(d) for d in found if d.setting == name]) for name in ("none", "merged", "both")
    )
    assert np.abs(both - sums).max() <= 1
    assert np.abs(both - none).mean() > 1
    assert np.abs(sums - np.stack([pixels(d) for d in alone])).max() <= 1


def test_guidance_is_at_work_where_the_pipeline_would_leave_it_out(tmp_path: Path) -> None:
    """Qwen-Image's pipeline ignores its scale without a negative prompt, with a line in the log."""
    pipe = tiny.pipeline("qwen-image")
    options = {"steps": 2, "height": tiny.SIDE, "width": tiny.SIDE}
    own = run(pipe, LONG, true_cfg_scale=4.0, negative_prompt=" ", output_type="np", generator=[seeded(0)])
    off = run(pipe, LONG, output_type="np", generator=[seeded(0)])

    [drawn] = generate(pipe, {"none": []}, [LONG], 1, tmp_path, sampling=Sampling(**options))

    assert np.array_equal(pixels(drawn), (own[0] * 255).round())
    assert not np.array_equal(pixels(drawn), (off[0] * 255).round())
    recipe = recipe_in(drawn.path)
    assert recipe
    assert (recipe["sampling"]["guidance"], recipe["sampling"]["negative_prompt"]) == (4.0, " ")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_frames_become_a_picture_that_moves(tmp_path: Path) -> None:
    pipe = tiny.pipeline("wan-1.3b")
    options: dict[str, Any] = {"steps": 2, "guidance": 1.0, "height": tiny.SIDE, "width": tiny.SIDE}
    own = run(pipe, LONG, num_frames=3, output_type="np", generator=[seeded(0)])

    [still] = generate(pipe, {"none": []}, [LONG], 1, tmp_path / "a", sampling=Sampling(**options))
    [moving] = generate(pipe, {"none": []}, [LONG], 1, tmp_path / "b", sampling=Sampling(**options, frames=3))

    with Image.open(still.path) as image:
        assert getattr(image, "n_frames", 1) == 1
    with Image.open(moving.path) as image:
        for k, frame in enumerate(own[0]):
            image.seek(k)
            assert np.array_equal(np.asarray(image.convert("RGB")), (frame * 255).round())
        assert image.n_frames == 3
    recipe = recipe_in(moving.path)
    assert recipe
    assert recipe["sampling"]["frames"] == 3


def test_commands_draw_and_learn(tmp_path: Path) -> None:
    """`generate`, `zip` and `calibrate` on a model that diffusers saved, with files of two tools."""
    pipe, (first, second) = pieces("z-image")
    pipe.save_pretrained(tmp_path / "base")
    files = [
        lm.save(first, tmp_path / "first.safetensors", dialect="comfyui"),
        lm.save(second, tmp_path / "second.safetensors", dialect="kohya"),
    ]
    common = ("--base", tmp_path / "base", "--device", "cpu", "--architecture", "z-image")
    prompts = ("-p", tiny.PROMPTS[0], "-p", LONG)
    quick = ("--sampling-steps", 2, "--trajectories", 1, "--resolution", tiny.SIDE)

    done(
        "zip",
        *files,
        *common,
        *prompts,
        *quick,
        "-s",
        "steps=2",
        "-s",
        "calibration=2",
        "-o",
        tmp_path / "z.safetensors",
    )
    done("calibrate", *files, *common, *prompts, *quick, "-o", tmp_path / "c.safetensors")
    lora = ("--lora", f"both={files[0]}:0.5+{files[1]}", "--lora", tmp_path / "z.safetensors")
    done("generate", *common, *lora, "-p", LONG, "--size", tiny.SIDE, "-n", 1, "--steps", 2, "-o", tmp_path / "out")

    merged = [lm.load(tmp_path / f"{name}.safetensors", architecture="z-image") for name in "zc"]
    assert all(set(lora) == set(first) for lora in merged)
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 3


# ---- what is refused


def test_pipelines_that_can_not_be_served_are_refused_with_the_way_out(tmp_path: Path) -> None:
    pipe, (lora, _) = pieces("wan-1.3b")
    uses = {"lora": [Use(lora)]}
    with pytest.raises(OptionError, match=r"WanPipeline draws 1 frame and then 2 at a time, so not 4. Way out: 3"):
        generate(pipe, uses, [LONG], 1, tmp_path, sampling=Sampling(frames=4))
    with pytest.raises(
        OptionError, match=r"QwenImagePipeline draws pictures, not videos. Way out: no number of frames"
    ):
        generate(tiny.pipeline("qwen-image"), {"none": []}, [LONG], 1, tmp_path, sampling=Sampling(frames=5))
    klein = tiny.pipeline("flux2-klein-4b")
    with pytest.raises(OptionError, match=r"Flux2KleinPipeline takes no negative prompt. Way out: none"):
        generate(klein, {"none": []}, [LONG], 1, tmp_path, sampling=Sampling(negative_prompt="bad"))


def test_two_denoisers_are_refused_and_the_way_out_works(tmp_path: Path) -> None:
    pipe, (lora, _) = pieces("wan-1.3b")
    second = tiny.pipeline("wan-1.3b", seed=1).transformer
    whole = type(pipe)(**{**pipe.components, "transformer_2": second}, boundary_ratio=0.9)
    whole.set_progress_bar_config(disable=True)
    with pytest.raises(OptionError, match=r"WanPipeline has two denoisers.*load_into_transformer_2=True"):
        generate(whole, {"lora": [Use(lora)]}, [LONG], 1, tmp_path, sampling=Sampling(height=16, width=16))
    with pytest.raises(OptionError, match=r"WanPipeline has two denoisers.*transformer_2=None, boundary_ratio=None"):
        load(whole, device="cpu")

    whole.load_lora_weights(lora.state_dict("diffusers-peft"), adapter_name="a")
    whole.load_lora_weights(lora.state_dict("diffusers-peft"), adapter_name="b", load_into_transformer_2=True)
    assert whole.get_list_adapters() == {"transformer": ["a"], "transformer_2": ["b"]}
    whole.unload_lora_weights()
    whole.save_pretrained(tmp_path / "whole")
    one = type(pipe).from_pretrained(tmp_path / "whole", transformer_2=None, boundary_ratio=None)
    assert load(one, device="cpu").pipe.transformer_2 is None


def test_a_pipeline_that_needs_more_than_a_prompt_or_loads_no_loras_is_refused(tmp_path: Path) -> None:
    class FromPicture(DiffusionPipeline):
        def __call__(self, image: Any, prompt: Any = None) -> None: ...

    class NoLoader(DiffusionPipeline):
        def __call__(self, prompt: Any = None, guidance_scale: float = 1.0) -> None: ...

    with pytest.raises(OptionError, match=r"FromPicture draws from more than a prompt \(image\).*applied"):
        generate(FromPicture(), {"none": []}, [LONG], 1, tmp_path)
    with (
        pytest.raises(OptionError, match=r"diffusers loads no LoRAs into a NoLoader. Way out: 'loramerge bake'"),
        applied(NoLoader(), [(tiny.lora("wan-1.3b", 1), 1.0)]),
    ):
        pass
    with pytest.raises(OptionError, match=r"is a NoLoader; wanted .*WanPipeline.*give loramerge.learned the model"):
        load(NoLoader(), device="cpu")
    wan = load(tiny.pipeline("wan-1.3b"), device="cpu")
    with pytest.raises(MergeError, match=r"a LoRA of z-image.*WanPipeline: wanted wan-14b or wan-1.3b or wan-5b"):
        wan.check([tiny.lora("z-image", 1)])
