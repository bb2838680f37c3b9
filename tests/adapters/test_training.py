"""Training a LoRA: what a step is, what a run depends on, what becomes of the model and of the data's mistakes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image

import loramerge as lm
from listings import filled
from loramerge import LoRA
from loramerge.diffusion import Denoiser, TrainSettings, TrainStep, from_images, load, team, train_lora
from loramerge.diffusion.apply import fingerprint
from loramerge.diffusion.training import draw
from loramerge.diffusion.training.checks import hints
from loramerge.diffusion.training.loop import LossScale, Run
from loramerge.diffusion.training.order import Order
from loramerge.diffusion.training.peft_layers import injected
from loramerge.diffusion.training.settings import TEXT, UNET, Targets
from loramerge.errors import DeviceMemoryError, FileError, NumberError, OptionError
from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.lora import from_tensors
from loramerge.scoring.captions import captioned, cropped
from loramerge.tensors import Held
from loramerge.testing import relative_error

CAPTION = tiny.PROMPTS[0]
QUICK: dict[str, Any] = {"rank": 2, "steps": 3, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.images(tmp_path_factory.mktemp("data") / "photos", CAPTION, count=3)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.images(tmp_path_factory.mktemp("data") / "people", "a person", count=2, seed=5)


@pytest.fixture(scope="module")
def sdxl() -> Denoiser:
    return load(tiny.pipeline("sdxl"))


def trained(denoiser: Denoiser, folder: Path, changes: dict[str, Any] | None = None, **more: Any) -> LoRA:
    return train_lora(denoiser, folder, settings=TrainSettings(**QUICK | (changes or {})), **more)


def same(a: LoRA, b: LoRA) -> bool:
    pairs = [(a[m], b[m]) for m in a]
    return list(a) == list(b) and all(
        np.array_equal(x.down, y.down) and np.array_equal(x.up, y.up)
        for x, y in pairs  # type: ignore[attr-defined]
    )


def distance(a: LoRA, b: LoRA) -> float:
    return max(relative_error(np.asarray(a[m].delta()), np.asarray(b[m].delta())) for m in a)


# ---- what a step is


def plain_steps(
    pipe: DiffusionPipeline, folder: Path, given: TrainSettings, loss_of: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The same steps as diffusers' scripts write them, on the same random numbers."""
    unet, xl = pipe.unet, pipe.text_encoder_2 if "text_encoder_2" in pipe.components else None
    config = LoraConfig(
        r=given.rank,
        lora_alpha=given.rank,
        init_lora_weights="gaussian",
        target_modules=["to_k", "to_q", "to_v", "to_out.0"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(given.seed)
        inject_adapter_in_model(config, unet)
    learning = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=given.learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    noiser = DDPMScheduler.from_config(pipe.scheduler.config)
    order = Order(from_images(load(pipe), [folder]), given.seed)
    files = [picture.path for picture in captioned(folder)]
    for step in range(given.steps):
        drawn = order.drawn(0, step)
        square = cropped(files[drawn.picture], tiny.SIDE)
        pixels = torch.from_numpy(square.pixels)[None]
        pixels = pixels.flip(-1) if drawn.mirrored else pixels
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
            encoded = pipe.encode_prompt(
                CAPTION, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        noise, timestep = drawn.noise[None], drawn.timestep[None]
        noisy = noiser.add_noise(latents, noise, timestep)
        added = None
        if xl is not None:
            ids = torch.tensor([[*square.original, *square.corner, tiny.SIDE, tiny.SIDE]])
            added = {"text_embeds": encoded[2], "time_ids": ids}
        predicted = unet(noisy, timestep, encoded[0], added_cond_kwargs=added).sample
        velocity = noiser.config.prediction_type == "v_prediction"
        target = noiser.get_velocity(latents, noise, timestep) if velocity else noise
        loss = loss_of(predicted, target, noiser, timestep)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
    return {
        f"unet.{path}": layer.get_delta_weight("default").detach()
        for path, layer in unet.named_modules()
        if isinstance(layer, LoraLayer)
    }


def mean_square(predicted: torch.Tensor, target: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.nn.functional.mse_loss(predicted, target)


def min_snr(predicted: torch.Tensor, target: torch.Tensor, noiser: Any, timestep: torch.Tensor) -> torch.Tensor:
    snr = compute_snr(noiser, timestep)
    weight = torch.clamp(snr, max=5.0) / (snr + 1 if noiser.config.prediction_type == "v_prediction" else snr)
    return (torch.nn.functional.mse_loss(predicted, target, reduction="none").mean((1, 2, 3)) * weight).mean()


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("architecture", ["sdxl", "sd15", "sd21"])
def test_a_run_is_what_diffusers_scripts_compute(architecture: str, gamma: float | None, photos: Path) -> None:
    found = trained(load(tiny.pipeline(architecture)), photos, {"snr_gamma": gamma})

    given = TrainSettings(**QUICK)
    wanted = plain_steps(tiny.pipeline(architecture), photos, given, min_snr if gamma else mean_square)

    assert set(found) == set(wanted)
    # Attention over the one pixel of their middle blocks has no gradient in its queries and keys: Adam steps on rounding.
    idle = (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_k",
    )
    for module, delta in wanted.items():
        if architecture == "sdxl" or not module.endswith(idle):
            assert relative_error(found[module].delta(), delta.numpy()) < 1e-3
    assert found.architecture == architecture.replace("sd21", "sd15")  # a tiny one has no shapes to tell them apart


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warm_up", [0, 4])
def test_the_learning_rate_goes_as_in_diffusers(schedule: str, warm_up: int) -> None:
    given = TrainSettings(steps=12, warm_up=warm_up, schedule=schedule, learning_rate=0.3)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warm_up, num_training_steps=12)

    for step in range(12):
        assert given.rate(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_the_loss_falls_where_one_picture_is_learned(tmp_path: Path) -> None:
    folder = tiny.images(tmp_path / "one", CAPTION, count=1)
    losses: list[float] = []

    trained(
        load(tiny.pipeline("sdxl")),
        folder,
        {"rank": 8, "steps": 40, "batch_size": 4, "targets": "all", "flip": False, "learning_rate": 0.03},
        on_step=lambda step: losses.append(step.loss),
    )

    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def test_accumulated_passes_are_one_batch(sdxl: Denoiser, photos: Path) -> None:
    joint = trained(sdxl, photos, {"batch_size": 4})
    parts = trained(sdxl, photos, {"batch_size": 2, "accumulate": 2})

    assert distance(parts, joint) < 1e-4
    assert distance(trained(sdxl, photos), joint) > 1e-2


def test_the_class_counts_with_its_weight(sdxl: Denoiser, photos: Path, people: Path) -> None:
    """∇ at weight w is ∇own + w ∇class: the loss too."""

    def loss(**prior: Any) -> float:
        losses: list[float] = []
        trained(sdxl, photos, {"steps": 1, **prior}, on_step=lambda step: losses.append(step.loss))
        return losses[0]

    own, even, twice = loss(), loss(prior=people), loss(prior=people, prior_weight=2.0)

    assert even > own
    assert twice - own == pytest.approx(2 * (even - own), rel=1e-5)
    kept = trained(sdxl, photos, {"prior": people, "prior_weight": 0.0})
    assert distance(kept, trained(sdxl, photos)) < 1e-3
    assert distance(trained(sdxl, photos, {"prior": people}), kept) > 1e-2


def test_every_picture_is_seen_once_before_any_comes_again(sdxl: Denoiser, photos: Path) -> None:
    order = Order(from_images(sdxl, [photos]), 3)

    seen = [[order.drawn(0, 3 * epoch + i).picture for i in range(3)] for epoch in range(6)]

    assert all(sorted(epoch) == [0, 1, 2] for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) > 1
    assert len({float(order.drawn(0, n).noise.sum()) for n in range(18)}) == 18


def of_all(module: str) -> bool:
    return any(part in module for part in (".attentions.", ".resnets.", "samplers."))


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [("attention", tiny.attention), ("transformers", lambda m: ".attentions." in m), ("all", of_all)],
)
def test_the_modules_that_learn_are_those_asked_for(
    targets: str, wanted: Callable[[str], bool], sdxl: Denoiser, photos: Path
) -> None:
    found = trained(sdxl, photos, {"targets": targets, "steps": 1})

    assert set(found) == {module for module in tiny.shapes("sdxl") if wanted(module)}
    assert all(found.layout(module).shape == tiny.shapes("sdxl")[module] for module in found)
    assert all(found[module].norm() > 0 for module in found)


@pytest.mark.parametrize(
    ("targets", "published"),
    [
        ("attention", "sdxl_diffusers_new_te"),
        ("attention", "sd15_hyper07_peft_base_model"),
        ("transformers", "sdxl_kohya_lora_r16a8"),
        ("transformers", "sd15_kohya_lora_r4a1"),
        ("all", "sdxl_kohya_c3lier_unet"),
    ],
)
def test_targets_are_the_modules_of_published_files(targets: Targets, published: str) -> None:
    lora = from_tensors({key: Held(array) for key, array in filled(published).items()}, {}, published)
    components = {module.partition(".")[0] for module in lora}
    ends = {c: tuple(f".{end}" for end in (UNET if c == "unet" else TEXT)[targets]) for c in components}

    every = ARCHITECTURES[lora.architecture or ""].shapes
    assert set(lora) == {m for m in every for c in components if m.startswith(f"{c}.") and m.endswith(ends[c])}


def test_text_encoders_learn_where_asked(photos: Path) -> None:
    pipe = tiny.pipeline("sdxl")
    before = fingerprint(pipe)

    found = trained(load(pipe, text_encoders=True), photos)

    moved = {module.partition(".")[0] for module in found if found[module].norm() > 0}
    assert moved == {"unet", "text_encoder", "text_encoder_2"}
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" in found
    assert fingerprint(pipe) == before


def test_a_model_in_bfloat16_learns_nearly_the_same_with_factors_in_float32(photos: Path, sdxl: Denoiser) -> None:
    found = trained(load(tiny.pipeline("sdxl"), dtype="bf16"), photos)

    wanted = trained(sdxl, photos)
    factors = [np.asarray(factor) for module in found for factor in found[module].factors()]
    down = [np.asarray(found[m].factors()[1]) - np.asarray(wanted[m].factors()[1]) for m in found]

    assert all(factor.dtype == np.float32 for factor in factors)
    assert max(np.abs(difference).max() for difference in down) < 0.1
    assert json.loads(found.metadata["loramerge.training"])["trained_on"]["precision"] == "bfloat16"


def test_gradient_checkpointing_changes_nothing(sdxl: Denoiser, photos: Path) -> None:
    found = trained(load(tiny.pipeline("sdxl"), checkpointing=True), photos, {"dropout": 0.5})

    assert distance(found, trained(sdxl, photos, {"dropout": 0.5})) < 1e-5
    assert distance(found, trained(sdxl, photos)) > 1e-2


def test_a_loss_scale_halves_on_overflow_and_grows_with_patience() -> None:
    scale = LossScale(8.0, patience=2)

    assert scale.lower()
    assert scale.value == 4
    scale.stepped()
    scale.stepped()
    assert scale.value == 8
    assert [scale.lower() for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("begin", [2.0**16, 2.0**40])
def test_in_float16_the_loss_is_scaled_as_far_as_goes(begin: float, sdxl: Denoiser, photos: Path) -> None:
    given, model = TrainSettings(**QUICK), load(tiny.pipeline("sdxl"), dtype="fp16")
    with injected(model, given) as inside:
        run = Run(model, inside, Order(from_images(model, [photos]), given.seed), given, team(cpu=True))
        run.scale = LossScale(begin, patience=2000)
        run.train(None, {}, 10, None)
        found = inside.taken()

    wanted = trained(sdxl, photos)
    downs = [np.asarray(found[m].factors()[1]) - np.asarray(wanted[m].factors()[1]) for m in found]
    assert max(np.abs(difference).max() for difference in downs) < 0.05
    assert (run.scale.value < begin) == (begin > 2**16)
    assert run.reached == 3


# ---- what a run depends on


class Killed(Exception):
    pass


def killer(at: int) -> Callable[[TrainStep], None]:
    def on_step(step: TrainStep) -> None:
        if step.step == at:
            raise Killed

    return on_step


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.5}, {"schedule": "cosine", "warm_up": 2, "accumulate": 2}])
def test_a_run_that_goes_on_equals_the_uninterrupted_one(
    changes: dict[str, Any], photos: Path, people: Path, tmp_path: Path
) -> None:
    chosen = {**changes, "steps": 6, "snr_gamma": 5.0, "prior": people}
    state = tmp_path / "state.safetensors"
    whole = trained(load(tiny.pipeline("sdxl")), photos, chosen)
    numbers: list[int] = []

    with pytest.raises(Killed):
        trained(load(tiny.pipeline("sdxl")), photos, chosen, checkpoint=state, every=2, on_step=killer(5))
    rest = trained(
        load(tiny.pipeline("sdxl")), photos, chosen, checkpoint=state, on_step=lambda step: numbers.append(step.step)
    )

    assert numbers == [5, 6]
    assert same(rest, whole)
    assert rest.metadata == whole.metadata


def test_a_run_that_goes_on_with_text_encoders_equals_the_uninterrupted_one(photos: Path, tmp_path: Path) -> None:
    def run(**more: Any) -> LoRA:
        return trained(load(tiny.pipeline("sdxl"), text_encoders=True), photos, {"steps": 4}, **more)

    state = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        run(checkpoint=state, every=2, on_step=killer(3))

    assert same(run(checkpoint=state), run())


def test_more_steps_go_on_from_a_finished_run(sdxl: Denoiser, photos: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    short = trained(sdxl, photos, {"steps": 2}, checkpoint=state)

    assert same(trained(sdxl, photos, {"steps": 2}, checkpoint=state), short)
    assert same(trained(sdxl, photos, {"steps": 4}, checkpoint=state), trained(sdxl, photos, {"steps": 4}))


def test_a_run_goes_on_from_the_state_of_an_optimiser_that_was_not_fused(
    sdxl: Denoiser, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, fused = tmp_path / "state.safetensors", torch.optim.AdamW
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.optim, "AdamW", lambda parameters, **options: fused(parameters, **options | {"fused": None})
        )
        trained(sdxl, photos, {"steps": 2}, checkpoint=state)

    found = trained(sdxl, photos, {"steps": 4}, checkpoint=state)

    assert distance(found, trained(sdxl, photos, {"steps": 4})) <= 1e-4


def test_a_run_that_is_told_to_stop_keeps_its_state(sdxl: Denoiser, photos: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"

    part = trained(sdxl, photos, {"steps": 4}, checkpoint=state, on_step=lambda step: step.step < 3)

    assert part.metadata["ss_steps"] == "3"
    assert same(trained(sdxl, photos, {"steps": 4}, checkpoint=state), trained(sdxl, photos, {"steps": 4}))


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 0.1}, {"rank": 4}, {"batch_size": 2}])
def test_a_state_of_another_run_is_refused(
    change: dict[str, Any], sdxl: Denoiser, photos: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.safetensors"
    trained(sdxl, photos, {"steps": 1}, checkpoint=state)

    with pytest.raises(OptionError, match="of another run, with other settings"):
        trained(sdxl, photos, {"steps": 2, **change}, checkpoint=state)


def test_a_state_of_other_pictures_or_of_another_model_is_refused(
    sdxl: Denoiser, photos: Path, people: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.safetensors"
    trained(sdxl, photos, {"steps": 1}, checkpoint=state)

    with pytest.raises(OptionError, match="with other data"):
        trained(sdxl, people, checkpoint=state)
    with pytest.raises(OptionError, match="with other fingerprint"):
        trained(load(tiny.pipeline("sdxl", seed=1)), photos, checkpoint=state)
    with pytest.raises(OptionError, match="at step 1, past 0"):
        trained(sdxl, photos, {"steps": 0}, checkpoint=state)


def test_the_seed_says_what_is_learned(sdxl: Denoiser, photos: Path) -> None:
    torch.manual_seed(11)
    first = trained(sdxl, photos)
    after = torch.rand(3)
    torch.manual_seed(12)

    assert same(trained(sdxl, photos), first)
    assert not same(trained(sdxl, photos, {"seed": 1}), first)
    torch.manual_seed(11)
    assert torch.equal(after, torch.rand(3))


def test_drawing_on_the_way_changes_nothing(photos: Path, tmp_path: Path) -> None:
    model = load(tiny.pipeline("sdxl"))
    drawn: list[Path] = []

    def on_step(step: TrainStep) -> None:
        drawn.extend(draw(model, [CAPTION], tmp_path / "a.safetensors", step.step, sampling_steps=2))

    found = trained(model, photos, on_step=on_step)

    assert same(found, trained(model, photos))
    assert [path.name for path in drawn] == [f"a-{step:06d}-0.png" for step in (1, 2, 3)]
    images = [np.asarray(Image.open(path)).astype(int) for path in drawn]
    assert np.abs(images[2] - images[0]).max() > 2


def test_pictures_on_the_way_are_drawn_without_dropout(photos: Path, tmp_path: Path) -> None:
    model, pictures = load(tiny.pipeline("sdxl")), []

    def on_step(step: TrainStep) -> None:
        for name in ("a", "b"):
            place = tmp_path / f"{name}.safetensors"
            pictures.append(np.asarray(Image.open(draw(model, [CAPTION], place, step.step, sampling_steps=2)[0])))

    given = {"dropout": 0.5}
    found = trained(model, photos, given, on_step=on_step)

    assert all(np.array_equal(a, b) for a, b in zip(pictures[::2], pictures[1::2], strict=True))
    assert same(found, trained(model, photos, given))
    assert not same(found, trained(model, photos))


# ---- beside another LoRA


@pytest.fixture(scope="module")
def first(sdxl: Denoiser, people: Path) -> LoRA:
    return trained(sdxl, people, {"learning_rate": 0.05, "seed": 7})


def test_beside_another_lora_is_training_on_a_model_that_has_it_in_its_weights(
    sdxl: Denoiser, first: LoRA, photos: Path
) -> None:
    pipe = tiny.pipeline("sdxl")
    for module in first:
        weight = pipe.unet.get_submodule(module.removeprefix("unet.")).weight.data
        weight += torch.from_numpy(np.asarray(first[module].delta()))

    found = trained(sdxl, photos, beside=first)

    assert distance(found, trained(load(pipe), photos)) <= 1e-3
    assert distance(found, trained(sdxl, photos)) > 0.05
    assert json.loads(found.metadata["loramerge.training"])["trained_on"]["beside"]["off_rows"] is False


def test_off_the_rows_of_another_lora_the_sum_does_to_its_inputs_what_that_does(
    sdxl: Denoiser, first: LoRA, photos: Path, tmp_path: Path
) -> None:
    found = trained(sdxl, photos, beside=first, off_rows=True)

    assert all(np.linalg.norm(found[m].delta()) > 0 for m in found)
    for module in found:
        inputs = np.asarray(first[module].factors()[1], dtype=np.float64).T
        alone, both = (np.asarray(sum(x[module].delta() for x in some)) @ inputs for some in ([first], [first, found]))
        assert relative_error(both, alone) <= 1e-5
    state = tmp_path / "state.safetensors"
    trained(sdxl, photos, {"steps": 2}, beside=first, off_rows=True, checkpoint=state)
    assert same(trained(sdxl, photos, beside=first, off_rows=True, checkpoint=state), found)


def test_what_cannot_be_trained_beside_is_told(sdxl: Denoiser, first: LoRA, photos: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    trained(sdxl, photos, {"steps": 1}, beside=first, checkpoint=state)
    text = LoRA(
        name="worded",
        architecture="sdxl",
        dialect="diffusers",
        layouts={"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": first[next(iter(first))]},
    )
    other = LoRA(
        name="other", architecture=None, dialect="diffusers", layouts={"unet.nowhere": first[next(iter(first))]}
    )

    with pytest.raises(OptionError, match="off_rows needs beside"):
        trained(sdxl, photos, off_rows=True)
    with pytest.raises(OptionError, match=r"beside worded: it also changes text_encoder, .*--text-encoders"):
        trained(sdxl, photos, beside=text)
    with pytest.raises(lm.errors.MergeError, match=r"no module unet\.nowhere"):
        trained(sdxl, photos, beside=other)
    with pytest.raises(OptionError, match="beside"):
        trained(sdxl, photos, checkpoint=state)
    assert all(not module._forward_hooks for module in sdxl.model.modules())


# ---- the result, and the model afterwards


def test_the_model_is_as_before(photos: Path) -> None:
    pipe = tiny.pipeline("sdxl")
    modules = {
        name: dict(model.named_modules()) for name, model in pipe.components.items() if hasattr(model, "named_modules")
    }
    gradients = [p.requires_grad for p in pipe.unet.parameters()]
    before, attributes = fingerprint(pipe), set(vars(pipe.unet))

    trained(load(pipe), photos)
    with pytest.raises(Killed):
        trained(load(pipe, text_encoders=True), photos, on_step=killer(2))

    assert fingerprint(pipe) == before
    for name, held in modules.items():
        assert dict(getattr(pipe, name).named_modules()) == held
    assert [p.requires_grad for p in pipe.unet.parameters()] == gradients
    assert set(vars(pipe.unet)) == attributes
    assert not any(pipe.get_list_adapters().values())


@pytest.mark.parametrize(
    ("targets", "text_encoders", "alpha"), [("attention", False, None), ("attention", True, 1.0), ("all", False, 1.0)]
)
def test_it_draws_the_same_picture_in_plain_diffusers_and_through_kohya(
    targets: str, text_encoders: bool, alpha: float | None, photos: Path, tmp_path: Path
) -> None:
    model = load(tiny.pipeline("sdxl"), text_encoders=text_encoders)
    ours: list[Path] = []

    def on_step(step: TrainStep) -> None:
        if step.step == step.total:
            ours.extend(draw(model, [CAPTION], tmp_path / "a.safetensors", step.step, sampling_steps=2, seed=4))

    chosen = {"steps": 6, "learning_rate": 0.03, "targets": targets, "alpha": alpha}
    lora = trained(model, photos, chosen, on_step=on_step)
    plain = lm.save(lora, tmp_path / "diffusers.safetensors")
    kohya = lm.load(lm.save(lora, tmp_path / "kohya.safetensors", dialect="kohya"), architecture="sdxl")

    with_injected = np.asarray(Image.open(ours[0])).astype(int)
    none = picture(tiny.pipeline("sdxl"), None)
    through = [picture(tiny.pipeline("sdxl"), source) for source in (plain, kohya.state_dict("diffusers"))]
    assert np.abs(with_injected - none).max() > 5
    assert all(np.abs(image - with_injected).max() <= 1 for image in through)


def picture(pipe: DiffusionPipeline, source: Any) -> np.ndarray:
    if source is not None:
        pipe.load_lora_weights(source)
    image = pipe(
        CAPTION,
        num_inference_steps=2,
        guidance_scale=5.0,
        height=tiny.SIDE,
        width=tiny.SIDE,
        generator=torch.Generator().manual_seed(4),
    )
    return np.asarray(image.images[0]).astype(int)


def test_the_file_says_how_it_was_made(sdxl: Denoiser, photos: Path, people: Path, tmp_path: Path) -> None:
    lora = trained(sdxl, photos, {"alpha": 1.0, "prior": people, "snr_gamma": 5.0}, name="person", trigger="psq-person")
    kept = lm.load(lm.save(lora, tmp_path / "k.safetensors", dialect="kohya")).metadata

    assert lora.name == kept["modelspec.title"] == "person"
    assert kept["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert kept["modelspec.trigger_phrase"] == "psq-person"
    assert (kept["ss_network_dim"], kept["ss_network_alpha"]) == ("2", "1")
    assert (kept["ss_base_model_version"], kept["ss_steps"], kept["ss_learning_rate"]) == (
        "sdxl_base_v1-0",
        "3",
        "0.01",
    )
    assert (kept["ss_num_train_images"], kept["ss_num_reg_images"], kept["ss_seed"]) == ("3", "2", "42")
    told = json.loads(kept["loramerge.training"])
    assert told["settings"]["snr_gamma"] == 5.0
    assert [len(place["sha256"]) for place in told["trained_on"]["data"]["images"]] == [64, 64]
    assert str(tmp_path.parent) not in str(dict(kept))


# ---- mistakes


def test_mistakes_in_settings_are_all_told() -> None:
    with pytest.raises(OptionError) as caught:
        TrainSettings(rank=0, steps=-1, learning_rate=0, schedule="often", targets="all of it", dropout=1.0, seed=1.5)  # type: ignore[arg-type]

    for told in (
        "rank must be",
        "steps must be",
        "learning_rate must",
        "constant, linear, cosine, got 'often'",
        "dropout",
    ):
        assert told in str(caught.value)
    assert "seed must be a whole number from 0, got 1.5" in str(caught.value)
    for wrong in ({"prior_weight": 0.5}, {"alpha": 0.0}, {"max_grad_norm": math.inf}, {"warm_up": 500}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            TrainSettings(**wrong)  # type: ignore[arg-type]


def test_mistakes_in_the_data_are_told(sdxl: Denoiser, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tiny.images(tmp_path / "broken", CAPTION)
    (broken / "1.png").write_bytes(b"no picture")
    bare = tiny.images(tmp_path / "bare", None)

    with pytest.raises(FileError, match=r"empty holds no image; wanted files that end in \.png"):
        trained(sdxl, tmp_path / "empty")
    with pytest.raises(FileError, match="No such directory of images"):
        trained(sdxl, tmp_path / "nowhere")
    with pytest.raises(FileError, match=r"Can't read the image .*1\.png"):
        trained(sdxl, broken)
    with pytest.raises(FileError, match=r"2 of 2 images have no caption, such as 0\.png.*a prompt for all"):
        trained(sdxl, bare)
    assert len(trained(sdxl, bare, {"steps": 0}, prompt=CAPTION)) > 0


def test_what_does_not_fit_the_model_is_told(sdxl: Denoiser, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="resolution must be a multiple of 2, got 17"):
        trained(sdxl, photos, {"resolution": 17})
    with pytest.raises(OptionError, match="Training in fp16 needs CUDA"):
        trained(load(tiny.pipeline("sdxl"), dtype="fp16"), photos)
    sd3 = tiny.pipeline("sd3-medium")
    with pytest.raises(OptionError, match=r"is a StableDiffusion3Pipeline, whose text encoders aren't trained here"):
        trained(load(sd3, text_encoders=True), photos)
    with pytest.raises(OptionError, match=r"no layers besides its blocks' to train. Way out: targets 'transformers'"):
        trained(load(sd3), photos, {"targets": "all"})
    with pytest.raises(OptionError, match=r"this model is a flow. Way out: no snr_gamma"):
        trained(load(sd3), photos, {"snr_gamma": 5.0})
    with pytest.raises(FileError, match="Can't write"):
        trained(sdxl, photos, checkpoint=tmp_path / "nowhere" / "state.safetensors", on_step=killer(1))
    pipe = tiny.pipeline("sdxl")
    pipe.load_lora_weights(tiny.lora("sdxl", 1).state_dict("diffusers"), adapter_name="other")
    with pytest.raises(OptionError, match=r"has LoRAs already.*unload_lora_weights"):
        trained(load(pipe), photos)
    assert pipe.get_list_adapters()["unet"] == ["other"]


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(sdxl: Denoiser, photos: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    steps: list[TrainStep] = []

    said = r"not finite at step \d+.*smaller learning rate.*state\.safetensors; a run with other settings takes another"
    with pytest.raises(NumberError, match=said):
        trained(sdxl, photos, {"learning_rate": 1e30, "steps": 9}, checkpoint=state, on_step=steps.append)

    assert (
        lm.files.storage.reader.SafetensorsFile(state).metadata["loramerge.state"].startswith(f'{{"step": {len(steps)}')
    )


def test_out_of_memory_says_what_to_lower_and_where_the_state_is(sdxl: Denoiser, photos: Path, tmp_path: Path) -> None:
    def full(step: TrainStep) -> None:
        if step.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    state = tmp_path / "state.safetensors"
    advice = r"1 LoRA × 1 examples at 16.*checkpointing.*bf16.*batch size.*resolution.*goes on from there"
    with pytest.raises(DeviceMemoryError, match=advice):
        trained(sdxl, photos, checkpoint=state, every=1, on_step=full)
    assert same(trained(sdxl, photos, checkpoint=state), trained(sdxl, photos))


def test_hints_tell_of_missing_triggers_and_small_pictures(photos: Path, tmp_path: Path) -> None:
    model = load(tiny.pipeline("sdxl"))
    mixed = tiny.images(tmp_path / "mixed", CAPTION)
    (mixed / "1.txt").write_text("a boy")

    assert hints(model, photos, trigger="psq-person") == []
    assert hints(model, photos) == []
    assert (
        "1 of 2 captions lack the trigger 'psq-person', such as that of 1.png: 'a boy'"
        in hints(model, mixed, trigger="psq-person")[0]
    )
    assert "No rare word is in all 2 captions" in hints(model, mixed)[0]
    assert "3 of 3 pictures are smaller than 64 × 64" in hints(model, photos, resolution=64)[0]
