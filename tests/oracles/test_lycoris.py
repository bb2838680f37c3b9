"""LyCORIS's own modules: the ΔW of its state dicts is what its forward pass adds."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch.nn import functional

import loramerge as lm
from loramerge import LoRA
from loramerge.layers import build
from loramerge.testing import relative_error

ATTENTION = (
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    (640, 640),
)
LINEAR = ("lora_unet_input_blocks_1_0_emb_layers_1", "unet.down_blocks.0.resnets.0.time_emb_proj", (320, 1280))
CONV = ("lora_unet_input_blocks_1_0_in_layers_2", "unet.down_blocks.0.resnets.0.conv1", (320, 320, 3, 3))
SKIP = ("lora_unet_input_blocks_4_0_skip_connection", "unet.down_blocks.1.resnets.0.conv_shortcut", (640, 320, 1, 1))
FIRST = ("lora_unet_input_blocks_0_0", "unet.conv_in", (320, 4, 3, 3))
PLACES = {"attention": ATTENTION, "linear": LINEAR, "conv3x3": CONV, "conv1x1": SKIP, "conv_in": FIRST}


@dataclass(frozen=True)
class Case:
    make: Callable[..., Any]
    roles: tuple[str, ...]
    place: str = "attention"


def locon(**options: Any) -> Callable[..., Any]:
    return functools.partial(LoConModule, **options)


def loha(**options: Any) -> Callable[..., Any]:
    return functools.partial(LohaModule, **options)


def lokr(**options: Any) -> Callable[..., Any]:
    return functools.partial(LokrModule, **options)


LOCON = ("lora_up.weight", "lora_down.weight")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
W1, W1_PAIR, W2, W2_PAIR = ("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")
FORMS = {
    "locon-tucker-conv3x3": Case(locon(use_tucker=True, lora_dim=4, alpha=2), (*LOCON, "lora_mid.weight"), "conv3x3"),
    "loha-tucker-conv3x3": Case(loha(use_tucker=True, lora_dim=3, alpha=2), (*LOHA, "hada_t1", "hada_t2"), "conv3x3"),
    "lokr-both-full": Case(lokr(full_matrix=True, factor=8, lora_dim=4, alpha=2), (*W1, *W2)),
    "lokr-both-full-conv3x3": Case(lokr(full_matrix=True, factor=8, lora_dim=4, alpha=2), (*W1, *W2), "conv3x3"),
    "lokr-both-factored": Case(lokr(decompose_both=True, lora_dim=4, alpha=2), (*W1_PAIR, *W2_PAIR)),
    "lokr-both-factored-conv3x3": Case(lokr(decompose_both=True, lora_dim=4, alpha=2), (*W1_PAIR, *W2_PAIR), "conv3x3"),
    "lokr-w1-factored": Case(
        lokr(decompose_both=True, unbalanced_factorization=True, lora_dim=8, alpha=2), (*W1_PAIR, *W2), "conv_in"
    ),
    "lokr-tucker-conv3x3": Case(
        lokr(use_tucker=True, factor=8, lora_dim=4, alpha=2), (*W1, *W2_PAIR, "lokr_t2"), "conv3x3"
    ),
    "lokr-unbalanced": Case(lokr(unbalanced_factorization=True, lora_dim=4, alpha=2), (*W1, *W2_PAIR), "linear"),
}
for place in ("attention", "linear", "conv3x3", "conv1x1"):
    FORMS |= {
        f"locon-{place}": Case(locon(lora_dim=4, alpha=2), LOCON, place),
        f"loha-{place}": Case(loha(lora_dim=4, alpha=2), LOHA, place),
        f"lokr-{place}": Case(lokr(factor=8, lora_dim=4, alpha=2), (*W1, *W2_PAIR), place),
    }
for name, make, roles in (("locon", locon, LOCON), ("loha", loha, LOHA), ("lokr", lokr, (*W1, *W2_PAIR))):
    FORMS |= {
        f"{name}-no-alpha": Case(make(lora_dim=4, alpha=None), roles),
        f"{name}-alpha-above-rank": Case(make(lora_dim=4, alpha=7), roles),
        f"{name}-rank-stabilised": Case(make(lora_dim=4, alpha=2, rs_lora=True), roles),
        f"{name}-scalar": Case(make(lora_dim=4, alpha=2, use_scalar=True), roles),
    }

cases = pytest.mark.parametrize("case", FORMS.values(), ids=FORMS)


def adapted(case: Case, **options: Any) -> Any:
    """A LyCORIS module with random values on a weight of zeros."""
    torch.manual_seed(0)
    stem, _, shape = PLACES[case.place]
    if len(shape) == 2:
        original = torch.nn.Linear(shape[1], shape[0], bias=False)
    else:
        original = torch.nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2, bias=False)
    torch.nn.init.zeros_(original.weight)
    module = case.make(stem, original, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.apply_to()
    return module.eval()


def saved(case: Case, module: Any) -> dict[str, torch.Tensor]:
    stem = PLACES[case.place][0]
    return {f"{stem}.{role}": tensor.detach().contiguous() for role, tensor in module.custom_state_dict().items()}


def read(case: Case, module: Any) -> LoRA:
    return lm.load(saved(case, module), architecture="sdxl")


def inputs(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(7, shape[1]) if len(shape) == 2 else torch.randn(2, shape[1], 6, 6)


def applied(delta: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    weight = torch.as_tensor(np.asarray(delta, np.float64))
    if weight.ndim == 2:
        return functional.linear(x.double(), weight)
    return functional.conv2d(x.double(), weight, padding=weight.shape[2] // 2)


@cases
def test_the_state_dict_has_the_form_that_the_case_names(case: Case) -> None:
    assert set(adapted(case).custom_state_dict()) == {*case.roles, "alpha"}


@cases
def test_the_delta_is_what_lycoris_adds(case: Case) -> None:
    module = adapted(case)
    _, name, shape = PLACES[case.place]
    x = inputs(shape)

    wanted = module.org_module[0](x).detach()

    assert relative_error(applied(read(case, module)[name].delta(), x), wanted) <= 1e-6


@cases
def test_the_factors_multiply_to_what_lycoris_adds(case: Case) -> None:
    module = adapted(case)
    _, name, shape = PLACES[case.place]
    x = inputs(shape)
    up, down = (np.asarray(factor, np.float64) for factor in read(case, module)[name].factors())

    wanted = module.org_module[0](x).detach()

    assert relative_error(applied((up @ down).reshape(shape), x), wanted) <= 1e-6


@cases
def test_a_layer_built_from_roles_is_the_one_that_is_read(case: Case) -> None:
    module = adapted(case)
    _, name, shape = PLACES[case.place]
    held = {role.removesuffix(".weight").removeprefix("lora_"): t for role, t in module.custom_state_dict().items()}
    alpha = float(held.pop("alpha"))
    built = build({role: tensor.detach().numpy() for role, tensor in held.items()}, alpha, shape)

    assert relative_error(built.delta(), read(case, module)[name].delta()) <= 1e-7


def test_the_alpha_of_a_lokr_with_both_parts_full_is_ignored_as_in_lycoris() -> None:
    case = FORMS["lokr-both-full"]
    module = adapted(case)
    stem, name, _ = PLACES[case.place]
    tensors = saved(case, module) | {f"{stem}.alpha": torch.tensor(2.5)}
    roles = [tensors.get(f"{stem}.{role}") for role in LokrModule.weight_list]
    with torch.no_grad():
        again = LokrModule.make_module_from_state_dict(stem, module.org_module[0], *roles)

    wanted = again.get_weight(again.shape).detach()

    assert relative_error(lm.load(tensors, architecture="sdxl")[name].delta(), wanted) <= 1e-6


@pytest.mark.parametrize("place", ["attention", "linear", "conv3x3"])
@pytest.mark.parametrize("on_out", [True, False], ids=["out", "in"])
@pytest.mark.parametrize("make", [LoConModule, LohaModule, LokrModule], ids=lambda make: make.__name__)
def test_the_dora_axis_is_lycoriss(make: Callable[..., Any], on_out: bool, place: str) -> None:
    case = Case(make, (), place)
    module = adapted(case, lora_dim=4, weight_decompose=True, wd_on_out=on_out)
    _, name, _ = PLACES[place]

    layer = read(case, module)[name]

    assert layer.axis == ("out" if on_out else "in")
    assert np.array_equal(np.asarray(layer.magnitude), module.dora_scale.detach().numpy())
