"""Training of the base: the loss, the schedule, the resumption, and the command."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline

from virtual_tryon import model, train_base
from virtual_tryon.rendering import latent_data, shown
from virtual_tryon.training import (
    LOG,
    Progress,
    Settings,
    Training,
    held_out_loss,
    rate_factor,
    save_state,
    velocity_error,
)
from virtual_tryon.world import draw

TINY = [
    "--device",
    "cpu",
    "--resolution",
    "32",
    "--pictures",
    "16",
    "--held-out",
    "8",
    "--batch",
    "4",
    "--sample-steps",
    "2",
    "--text-steps",
    "2",
]


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    return latent_data(folder, tmp_path_factory.mktemp("data"), 12, seed=0, processes=1)


def training(folder: Path, data: tuple[np.ndarray, np.ndarray], **options: object) -> Training:
    settings = Settings(batch=2, samples=8, warm_up=2, **options)
    return Training(model.load(folder), *data, settings)


def values(of: Training) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in [*of.networks.parameters(), *of.average.parameters()]])


def test_the_data_are_the_latents_of_the_pictures_and_their_captions(
    folder: Path, data: tuple[np.ndarray, np.ndarray]
) -> None:
    pipeline = model.load(folder)
    picture, texts = shown(0, 7)

    latents, tokens = data

    with torch.no_grad():
        found = pipeline.vae.encode(model.as_tensor(draw(picture)[None])).latent_dist.mode()[0]
    expected = (found * pipeline.vae.config.scaling_factor).half()
    np.testing.assert_allclose(latents[7], expected, atol=2e-3)
    np.testing.assert_array_equal(tokens[7], np.stack(model.token_ids(pipeline, texts), 1))


def test_data_once_drawn_are_read(folder: Path, tmp_path: Path) -> None:
    drawn = latent_data(folder, tmp_path, 3, seed=0, processes=1)
    when = (tmp_path / "latents.npy").stat().st_mtime_ns

    read = latent_data(folder, tmp_path, 3, seed=0, processes=1)

    np.testing.assert_array_equal(drawn[0], read[0])
    assert (tmp_path / "latents.npy").stat().st_mtime_ns == when


def test_the_loss_is_the_error_of_diffusers_velocity(miniature: StableDiffusionXLPipeline) -> None:
    random = torch.Generator().manual_seed(0)
    latents, noise, found = (torch.randn(3, 16, 16, 16, generator=random) for _ in range(3))
    times = torch.tensor([3, 500, 999])
    theirs = DDPMScheduler.from_config(miniature.scheduler.config)
    seen = []

    def unet(noisy: torch.Tensor, *_: object, **__: object) -> object:
        seen.append(noisy)
        return type("Output", (), {"sample": found})

    loss = velocity_error(
        unet, latents, noise, times, theirs.alphas_cumprod, torch.zeros(()), torch.zeros(()), torch.zeros(1, 6)
    )

    torch.testing.assert_close(seen[0], theirs.add_noise(latents, noise, times))
    torch.testing.assert_close(loss, (found - theirs.get_velocity(latents, noise, times)).square().mean())


def test_training_changes_every_network(folder: Path, data: tuple[np.ndarray, np.ndarray]) -> None:
    run = training(folder, data)
    before = [next(network.parameters()).detach().clone() for network in run.networks]

    for _ in range(2):
        run.step()

    assert all(not torch.equal(b, next(n.parameters())) for b, n in zip(before, run.networks, strict=True))
    assert torch.isfinite(values(run)).all()


def test_bfloat16_stays_near_float32(folder: Path, data: tuple[np.ndarray, np.ndarray]) -> None:
    runs = [training(folder, data, bf16=bf16) for bf16 in (False, True)]

    losses = [float(run.loss(*run.batch()).detach()) for run in runs]

    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_resumed_training_equals_an_uninterrupted_one(folder: Path, data: tuple[np.ndarray, np.ndarray]) -> None:
    straight, first, second = (training(folder, data) for _ in range(3))
    for _ in range(4):
        straight.step()
    first.step()
    first.step()

    second.restore(first.state())
    second.step()
    second.step()

    assert torch.equal(values(second), values(straight))
    assert second.progress.samples == straight.progress.samples == 8


def test_a_checkpoint_of_other_processes_is_refused(folder: Path, data: tuple[np.ndarray, np.ndarray]) -> None:
    run = training(folder, data)
    state = run.state()

    with pytest.raises(ValueError, match="of 2 processes"):
        run.restore(state | {"random": state["random"] * 2})


def test_the_rate_warms_up_and_falls_to_one_percent() -> None:
    settings = Settings(batch=1, minutes=10, warm_up=100, decay_from=0.4)

    assert rate_factor(0, 0.0, settings) == pytest.approx(0.01)
    assert rate_factor(200, 0.3, settings) == 1
    assert rate_factor(10_000, 1.0, settings) == pytest.approx(0.01)


def test_a_loss_that_is_no_number_goes_back_to_the_checkpoint_with_half_the_rate(
    folder: Path, data: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    run = training(folder, data)
    run.step()
    save_state(run.state(), tmp_path / "checkpoint.pt")
    before = values(run)
    run.losses = [torch.tensor(float("nan"))]
    run.progress.step = LOG - 1

    train_base.step(run, tmp_path / "checkpoint.pt")

    assert torch.equal(values(run), before)
    assert run.progress.step == 1
    assert run.settings.rate == pytest.approx(Settings(batch=1).rate / 2)


def test_whichever_budget_ends_first_ends_the_training() -> None:
    progress = Progress(samples=50, seconds=30)

    assert progress.share(Settings(batch=1, minutes=1)) == 0.5
    assert progress.share(Settings(batch=1, minutes=1, samples=60)) == pytest.approx(5 / 6)
    assert progress.share(Settings(batch=1, minutes=0.1)) == 1


def test_the_held_out_loss_is_the_same_at_any_batch_size(
    miniature: StableDiffusionXLPipeline, data: tuple[np.ndarray, np.ndarray]
) -> None:
    assert held_out_loss(miniature, *data, size=5) == pytest.approx(held_out_loss(miniature, *data), rel=1e-5)


def test_the_command_trains_pauses_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "base"), *TINY]

    train_base.main([*out, "--samples", "8", "--pause-after", "0"])
    train_base.main([*out, "--samples", "8"])

    told = capsys.readouterr().out
    assert "paused at 50.0 %" in told
    assert "going on at step 1" in told
    assert told.endswith("finished\n")
    card = (tmp_path / "base" / "README.md").read_text()
    assert "8 in 2 steps of 4" in card
    assert "{" not in card
    assert (tmp_path / "base" / "samples.png").exists()
    assert model.generate(model.load(tmp_path / "base"), ["a man"], seed=0, steps=2).shape == (1, 32, 32, 3)
    with pytest.raises(SystemExit, match="holds a run with"):
        train_base.main([*out, "--samples", "8", "--seed", "1"])


def test_a_training_without_an_end_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_base.main(TINY)

    assert "say how long" in capsys.readouterr().err
