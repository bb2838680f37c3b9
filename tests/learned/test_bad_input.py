"""What learned merges refuse, and what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from loramerge.errors import LoRAMergeError, MergeError, NoFactorsError, NumberError, OptionError
from loramerge.files.lora import LoRA
from loramerge.learned.attach import attach
from loramerge.learned.calibration import calibrate
from loramerge.learned.columns import Learned, settings, ziplora
from loramerge.merging.coefficients import Coefficients
from loramerge.testing import random_lora
from toy import Batch, draw, from_factors, lora_for, predict, toy

MODEL = toy()
LORAS = [lora_for(MODEL, seed=1), lora_for(MODEL, seed=2, rank=3)]
CHOSEN = settings(steps=2, calibration=2)


def learn(loras: list[LoRA], model: nn.Module = MODEL, **options: object) -> Learned:
    return ziplora(predict(model), {"unet": model}, loras, draw, CHOSEN, **options)


def test_loras_of_two_families_are_refused() -> None:
    with pytest.raises(MergeError, match="different model families"):
        learn([random_lora("sdxl"), random_lora("flux")])


def test_a_lora_of_another_model_is_refused_by_module() -> None:
    with pytest.raises(MergeError, match=r"no module unet\.mid_block.*random-1 was made for another"):
        learn([random_lora("sdxl", seed=1), random_lora("sdxl", seed=2)])


def test_a_lora_of_other_shapes_is_refused_by_name_whichever_it_is() -> None:
    wide = from_factors({"unet.to_q": (np.ones((6, 1)), np.ones((1, 9)))}, name="wide")
    for loras in ([wide, wide], [LORAS[0], wide]):
        with pytest.raises(MergeError, match=r"\(6, 9\).* wide") as error:
            learn(loras)
        assert "to_q" in str(error.value)
    with (
        pytest.raises(MergeError, match=r"\(6, 6\) in the model and \(6, 9\) in the LoRA wide"),
        attach({"unet": MODEL}, [LORAS[0], wide]),
    ):
        pass


def test_loras_with_nothing_in_the_models_components_are_refused() -> None:
    with pytest.raises(MergeError, match="is in the model's components transformer"):
        ziplora(predict(MODEL), {"transformer": MODEL}, LORAS, draw, CHOSEN)


def test_loras_that_share_no_module_are_refused() -> None:
    with pytest.raises(MergeError, match="no module"):
        learn([lora_for(MODEL, ["unet.to_q"], seed=1), lora_for(MODEL, ["unet.to_k"], seed=2)])


def test_no_loras_are_refused() -> None:
    with pytest.raises(MergeError):
        learn([])
    with pytest.raises(MergeError), attach({"unet": MODEL}, []):
        pass


def test_a_layer_without_factors_is_refused_by_module() -> None:
    with pytest.raises(LoRAMergeError, match=r"unet\.to_q"):
        learn([lora_for(MODEL, ["unet.to_q"], kind="full"), LORAS[0]])
    with (
        pytest.raises(NoFactorsError, match=r"unet\.to_q"),
        attach({"unet": MODEL}, [lora_for(MODEL, ["unet.to_q"], kind="dora")]),
    ):
        pass


def test_a_layer_that_changes_a_bias_is_refused() -> None:
    layers = {m: replace(layer, diff_b=np.ones(layer.shape[0], np.float32)) for m, layer in LORAS[0].layouts.items()}
    with pytest.raises(MergeError, match="changes a bias"):
        learn([replace(LORAS[0], layouts=layers), LORAS[1]])


def test_a_module_of_another_kind_is_refused() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "grouped": nn.Conv2d(4, 4, 3, groups=2)})
    odd = from_factors({"unet.norm": (np.ones((4, 1)), np.ones((1, 4)))})
    with pytest.raises(MergeError, match="LayerNorm"), attach({"unet": model}, [odd]):
        pass
    grouped = lora_for(model, ["unet.grouped"])
    with (
        pytest.raises(MergeError, match=r"unet\.grouped: it is a convolution with groups"),
        attach({"unet": model}, [grouped]),
    ):
        pass


def test_hooks_are_taken_off_when_attaching_fails() -> None:
    wrong = from_factors({"unet.out": (np.ones((9, 1)), np.ones((1, 6)))}, name="wrong")
    with pytest.raises(MergeError), attach({"unet": MODEL}, [LORAS[0], wrong]):
        pass

    assert not any(module._forward_hooks for module in MODEL.modules())


def test_a_lora_that_changes_nothing_on_its_data_is_refused_by_name() -> None:
    idle = {m: replace(layer, up=np.zeros_like(layer.up)) for m, layer in LORAS[1].layouts.items()}
    with pytest.raises(MergeError, match="The LoRA idle changes nothing on its own data"):
        learn([LORAS[0], replace(LORAS[1], name="idle", layouts=idle)])


def test_a_component_that_is_never_run_is_refused() -> None:
    other = toy(1)
    moved = [replace(x, layouts={m.replace("unet", "text_encoder", 1): y for m, y in x.layouts.items()}) for x in LORAS]
    both = [replace(a, layouts={**a.layouts, **b.layouts}) for a, b in zip(LORAS, moved, strict=True)]
    models = {"unet": MODEL, "text_encoder": other}

    for init in ("lsq", "ones"):
        with pytest.raises(MergeError, match=r"never runs text_encoder\.to_q and 7 more"):
            ziplora(predict(MODEL), models, both, draw, settings(steps=1, calibration=1, init=init))
    with pytest.raises(MergeError, match="never runs text_encoder"):
        calibrate(predict(MODEL), models, both, draw, batches=1)


def test_a_module_that_the_loss_does_not_depend_on_stays_where_it_began(tmp_path: object) -> None:
    def half(given: Batch) -> torch.Tensor:
        MODEL.out(torch.zeros(len(given["x"]), 6))
        return MODEL.down(MODEL.conv_in(given["x"]))

    loras = [lora_for(MODEL, ["unet.conv_in", "unet.out"], seed=seed) for seed in (1, 2)]
    chosen = settings(steps=2, init="ones", loss="mse")
    found = ziplora(half, {"unet": MODEL}, loras, draw, chosen, checkpoint=tmp_path / "state")
    again = ziplora(
        half,
        {"unet": MODEL},
        loras,
        draw,
        replace(chosen, steps=3),
        checkpoint=tmp_path / "state",
    )

    assert np.array_equal(found.coefficients.columns["unet.out"].read(), np.ones((2, 6), np.float32))
    assert len(again.history) == 1


def test_data_of_another_size_than_asked_for_is_refused() -> None:
    with pytest.raises(MergeError, match="batch of"):
        ziplora(predict(MODEL), {"unet": MODEL}, LORAS, lambda i, g, n: draw(i, g, n + 1), CHOSEN)


def test_a_model_that_gives_other_rows_than_its_batch_is_refused() -> None:
    with pytest.raises(MergeError, match="predict gave 3 rows for a batch of 2"):
        ziplora(
            lambda given: torch.cat([MODEL(**given), MODEL(**given)[:1]]),
            {"unet": MODEL},
            LORAS,
            draw,
            settings(steps=1, init="ones"),
        )


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]])
def test_wrong_weights_are_refused(weights: list[float]) -> None:
    told = "Weights given: 1, LoRAs: 2" if len(weights) == 1 else "weights must be non-negative and not all zero, got"
    with pytest.raises(OptionError, match=told):
        learn(LORAS, weights=weights)


@pytest.mark.parametrize("weight", [[1.0], [1.0, -1.0], [1.0, float("nan")], [[1.0], [1.0]]])
def test_wrong_weights_of_examples_are_refused(weight: object) -> None:
    def weighed(lora: int, generator: torch.Generator, count: int) -> Batch:
        return {**draw(lora, generator, count), "weight": torch.tensor(weight)[lora:]}

    with pytest.raises(OptionError, match="one number from 0 per example, 2; got"):
        ziplora(predict(MODEL), {"unet": MODEL}, LORAS, weighed, settings(steps=1, init="ones", loss="mse"))


def test_batches_with_different_entries_are_refused() -> None:
    def uneven(lora: int, generator: torch.Generator, count: int) -> Batch:
        return {**draw(lora, generator, count), **({"weight": torch.ones(count)} if lora else {})}

    with pytest.raises(
        OptionError, match=r"entries \(x, t, text\), \(x, t, text, weight\); wanted the same ones in all"
    ):
        ziplora(predict(MODEL), {"unet": MODEL}, LORAS, uneven, settings(steps=1, init="ones", loss="mse"))


def test_a_negative_shard_is_refused() -> None:
    with pytest.raises(OptionError, match="shard"):
        learn(LORAS, shard=-1)


def test_coefficients_of_other_loras_are_refused() -> None:
    found = learn(LORAS).coefficients
    with pytest.raises(OptionError, match="for 2 LoRAs, got 1"):
        found.check(LORAS[:1])
    with pytest.raises(OptionError, match="in this order"):
        found.check(LORAS[::-1])
    with pytest.raises(OptionError, match="none of the LoRAs has"):
        found.check([lora_for(MODEL, ["unet.to_q"], seed=1), lora_for(MODEL, ["unet.to_q"], seed=2)])
    narrow = Coefficients.of({"unet.to_q": np.ones((2, 5), np.float32)}, LORAS, [1.0, 1.0])
    with pytest.raises(OptionError, match=r"\(2, 5\), wanted \(2, 6\)"):
        narrow.check(LORAS)


def test_the_models_parameters_learn_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        ziplora(lambda given: 1 / 0, {"unet": MODEL}, LORAS, draw, CHOSEN)

    assert all(parameter.requires_grad for parameter in MODEL.parameters())


def test_a_model_that_answers_nan_is_told_by_the_lora_that_acted() -> None:
    with pytest.raises(NumberError, match=r"with and without toy-1 differ by nan\. Way out: float32"):
        ziplora(lambda batch: predict(MODEL)(batch) * torch.nan, {"unet": MODEL}, LORAS, draw, CHOSEN)
