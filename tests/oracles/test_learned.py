"""Learned merges on diffusers' models: against PEFT, gradient checkpointing, and the pipelines that load the result."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

import loramerge as lm
from loramerge.errors import MergeError
from loramerge.files.lora import LoRA
from loramerge.learned.attach import attach
from loramerge.learned.batches import Batch
from loramerge.learned.calibration import calibrate
from loramerge.learned.columns import Learned, settings, ziplora
from loramerge.learned.least_squares import lsq

from . import pipelines
from .pipelines import attention, lora_for, pick

KINDS = ("lora", "lora", "loha", "lokr", "tucker")


def some(module: str, shape: tuple[int, ...]) -> bool:
    """A few layers of the UNet, convolutions with strides and of 1×1 among them."""
    return module.startswith("unet.") and (
        ("mid_block" in module and attention(module, shape) and "blocks.0." in module)
        or module.endswith(
            ("downsamplers.0.conv", "down_blocks.1.resnets.0.conv_shortcut", "down_blocks.1.resnets.0.conv1")
        )
    )


def unet() -> UNet2DConditionModel:
    return pipelines.pipeline("sdxl").unet


def denoise(given: Batch) -> Tensor:
    return unet()(given["sample"], given["timestep"], given["text"], added_cond_kwargs=given["added"]).sample


def draw(lora: int, generator: torch.Generator, count: int) -> Batch:
    return {
        "sample": torch.randn(count, 4, 8, 8, generator=generator) + lora,
        "timestep": torch.randint(0, 1000, (count,), generator=generator),
        "text": torch.randn(count, 3, 10, generator=generator),
        "added": {
            "text_embeds": torch.randn(count, 2, generator=generator),
            "time_ids": torch.randn(count, 6, generator=generator),
        },
    }


def sample(count: int = 2) -> Batch:
    return draw(0, torch.Generator().manual_seed(5), count)


def two(kinds: tuple[str, ...] = KINDS) -> list[LoRA]:
    return [
        lora_for("sdxl", some, seed=1, kind=lambda module: pick(module, kinds), rank=lambda module: 2),
        lora_for("sdxl", some, seed=2, rank=lambda module: 3),
    ]


def learn(loras: list[LoRA], **changes: object) -> Learned:
    chosen = settings(**{"steps": 2, "calibration": 1, "lr": 0.05, **changes})
    return ziplora(denoise, {"unet": unet()}, loras, draw, chosen)


@contextmanager
def in_peft(loras: list[LoRA], folder: Path) -> Iterator[list[str]]:
    pipe = pipelines.pipeline("sdxl")
    names = [f"adapter{i}" for i in range(len(loras))]
    try:
        for name, lora in zip(names, loras, strict=True):
            path = lm.save(lora, folder / f"{name}.safetensors", dialect="diffusers")
            pipe.load_lora_weights(str(path), adapter_name=name)
        yield names
    finally:
        pipe.unload_lora_weights()


def test_teachers_by_row_are_pefts_adapters_one_at_a_time(tmp_path: Path) -> None:
    loras, data = two(("lora",)), sample(3)
    with attach({"unet": unet()}, loras) as attachment, torch.no_grad():
        found = attachment.only(torch.tensor([1, 0, 1])) and denoise(data)
    with in_peft(loras, tmp_path) as names, torch.no_grad():
        alone = []
        for name in names:
            pipelines.pipeline("sdxl").set_adapters([name])
            alone.append(denoise(data))

    wanted = torch.stack([alone[1][0], alone[0][1], alone[1][2]])
    assert float((found - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())
    assert float((alone[0] - alone[1]).abs().max()) >= 1e-3 * float(wanted.abs().max())


@pytest.mark.parametrize("parametrisation", ["column", "down"])
def test_the_file_does_in_a_pipeline_what_the_student_did(parametrisation: str, tmp_path: Path) -> None:
    loras, data = two(), sample()
    learned = learn(loras, parametrisation=parametrisation)
    with attach({"unet": unet()}, loras) as attachment, torch.no_grad():
        base = attachment.only(torch.tensor([-1, -1])) and denoise(data)
        attachment.all()
        for module in attachment.sites:
            attachment.downs[module] = torch.from_numpy(np.array(learned.lora[module].factors()[1]))
        student = denoise(data)

    for dialect in ("diffusers", "kohya"):
        path = lm.save(learned.lora, tmp_path / f"{dialect}.safetensors", dialect=dialect)
        with pipelines.loaded("sdxl", str(path)), torch.no_grad():
            assert float((denoise(data) - student).abs().max()) <= 1e-5
    assert float((base - student).abs().max()) >= 1e-2


def test_the_closed_form_lowers_the_error_of_the_pipeline(tmp_path: Path) -> None:
    loras = two(("lora",))
    moments = calibrate(denoise, {"unet": unet()}, loras, draw, kind="core", batches=2)
    merged, report = lsq(loras, moments)

    assert set(report.fits) == set(merged)
    assert np.mean(list(report.fits.values())) < 0.8 * np.mean(list(report.means.values()))
    path = lm.save(merged, tmp_path / "merged.safetensors", dialect="diffusers")
    with pipelines.loaded("sdxl", str(path)) as layers:
        assert set(layers) == set(merged)


def test_on_sdxl_attention_shares_its_inputs_as_far_as_it_can() -> None:
    def projections(module: str, shape: tuple[int, ...]) -> bool:
        return module.startswith("unet.") and attention(module, shape)

    lora = lora_for("sdxl", projections, rank=lambda module: 1)
    moments = calibrate(denoise, {"unet": unet()}, [lora], draw, kind="gram", batches=1)
    kept = [module for module, found in moments.modules.items() if found.gram is not None]

    # Of 70 blocks: q, k and v of one attention, q of the other, both outputs; and one for the prompt.
    assert len(moments.modules) == 560
    assert len(kept) == 4 * 70 + 1


def test_gradient_checkpointing_changes_no_bit() -> None:
    loras = two()
    runs: list[int] = []
    block = unet().mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    handle = block.register_forward_hook(lambda *_: runs.append(1))
    try:
        plain = learn(loras)
        once = len(runs)
        unet().enable_gradient_checkpointing()
        checkpointed = learn(loras)
    finally:
        unet().disable_gradient_checkpointing()
        handle.remove()

    assert len(runs) - once == once + len(plain.history)  # every student's block ran again
    assert checkpointed.history == plain.history
    for module, tensor in plain.coefficients.columns.items():
        assert np.array_equal(tensor.read(), checkpointed.coefficients.columns[module].read())


def test_active_peft_adapters_are_refused_and_disabled_ones_are_looked_through(tmp_path: Path) -> None:
    loras = two(("lora",))
    plain = learn(loras)
    with in_peft(loras, tmp_path):
        with pytest.raises(MergeError, match="PEFT adapters are active"):
            learn(loras)
        unet().disable_lora()
        disabled = learn(loras)

    assert disabled.history == plain.history


def test_text_encoders_of_both_classes_are_found_under_the_published_names() -> None:
    def query(module: str, shape: tuple[int, ...]) -> bool:
        return module.endswith("layers.0.self_attn.q_proj")

    lora = lora_for("sdxl", query, rank=lambda module: 2)
    models = pipelines.components(pipelines.pipeline("sdxl"))
    with attach(models, [lora]) as attachment:
        assert set(attachment.sites) == {
            f"{encoder}.text_model.encoder.layers.0.self_attn.q_proj" for encoder in ("text_encoder", "text_encoder_2")
        }
        ids = torch.tensor([[0, 3, 1]])
        for encoder in ("text_encoder", "text_encoder_2"):
            models[encoder](ids)
        attachment.check_all_ran()
