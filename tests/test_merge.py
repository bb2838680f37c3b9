"""The merge is the weighted sum, whatever the inputs look like."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import loramerge as lm
from loramerge import linalg
from loramerge.files.architectures import ARCHITECTURES
from loramerge.files.lora import LoRA
from loramerge.layers import Carried, low_rank
from loramerge.testing import random_layer, relative_error, weighted_sum
from small import MODULES, WRITTEN, small

Case = tuple[list[LoRA], list[float]]
TO_Q, CONV, SHORTCUT, TEXT = MODULES["sdxl"]
SGM_TO_Q = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
"""Its name in a single file."""

CASES: dict[str, Case] = {
    "identity": ([small(seed=1)], [1.0]),
    "one half": ([small(seed=1)], [0.5]),
    "two halves": ([small(seed=1), small(seed=2)], [0.5, 0.5]),
    "alpha below rank": ([small(seed=1, rank=8, alpha=4), small(seed=2, rank=8, alpha=4)], [1.0, 1.0]),
    "two alphas": ([small(seed=1, rank=8, alpha=8), small(seed=2, rank=8, alpha=1)], [1.0, 1.0]),
    "two ranks": ([small(seed=1, rank=16), small(seed=2, rank=4)], [1.0, 1.0]),
    "subtraction": ([small(seed=1, rank=8, alpha=8), small(seed=2, rank=8, alpha=8)], [1.0, -0.5]),
    "disjoint modules": ([small(modules=(TO_Q, TEXT), seed=1), small(modules=(CONV,), seed=2)], [0.7, 0.6]),
    "four LoRAs": ([small(seed=i, rank=2 + i, alpha=3.0 * i + 1) for i in range(4)], [0.4, 0.3, 0.2, 0.1]),
}


def in_dialect(lora: LoRA, dialect: str) -> LoRA:
    return lm.load(lora.state_dict(dialect), architecture=lora.architecture)


@pytest.mark.parametrize(("first", "second"), list(product(WRITTEN, WRITTEN)))
@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_the_weighted_sum(case: str, first: str, second: str) -> None:
    loras, weights = CASES[case]
    inputs = [in_dialect(lora, dialect) for lora, dialect in zip(loras, [first, second] * 2, strict=False)]

    merged = in_dialect(lm.merge(inputs, weights=weights), second)

    assert set(merged) == {module for lora in loras for module in lora}
    for module in merged:
        assert relative_error(merged[module].delta(), weighted_sum(loras, weights, module)) <= 1e-6


@pytest.mark.parametrize(
    "kind", ["lora", "tucker", "loha", "loha-tucker", "lokr", "lokr-w1", "lokr-both", "lokr-tucker"]
)
def test_every_low_rank_kind_merges_exactly(kind: str) -> None:
    loras = [small(kind=kind, rank=2, alpha=3, seed=1), small(rank=3, seed=2)]

    merged = lm.merge(loras, weights=[0.8, -0.3])

    for module in merged:
        assert relative_error(merged[module].delta(), weighted_sum(loras, [0.8, -0.3], module)) <= 1e-6


@pytest.mark.parametrize("rank", [1, 3, 8, 11])
def test_a_smaller_rank_is_the_best_of_that_rank(rank: int) -> None:
    loras = [small(rank=4, seed=1), small(rank=8, seed=2)]

    merged = lm.merge(loras, rank=rank)

    for module in merged:
        exact = weighted_sum(loras, [1, 1], module).reshape(merged[module].shape[0], -1)
        optimum = np.linalg.norm(np.linalg.svd(exact, compute_uv=False)[rank:])
        error = np.linalg.norm(merged[module].delta().reshape(exact.shape) - exact)
        assert error <= optimum * (1 + 1e-4) + 1e-5 * np.linalg.norm(exact)
        assert merged[module].rank == rank


def test_max_is_the_largest_of_the_ranks() -> None:
    merged = lm.merge([small(rank=4), small(rank=6, seed=1)], rank="max")

    assert {layer.rank for layer in merged.values()} == {6}


def test_a_rank_never_exceeds_the_weight() -> None:
    module = "transformer.x_embedder"
    loras = [small("flux", (module,), rank=40, seed=i) for i in range(2)]

    merged = lm.merge(loras)

    assert merged[module].rank == 64
    assert relative_error(merged[module].delta(), weighted_sum(loras, [1, 1], module)) <= 1e-6


def test_equal_loras_merge_into_themselves_at_their_rank() -> None:
    lora = small(rank=4)

    merged = lm.merge([lora, lora, lora], weights="uniform", rank=4)

    for module in merged:
        assert relative_error(merged[module].delta(), lora[module].delta()) <= 1e-5


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_many_loras_are_cut_by_random_projection_close_to_the_optimum(decay: float) -> None:
    spectrum = np.arange(1, 65, dtype=np.float32) ** -decay
    loras = [small(modules=(TO_Q,), rank=64, seed=i) for i in range(6)]
    layers = [low_rank(lora[TO_Q].up * spectrum, lora[TO_Q].down, (640, 640)) for lora in loras]
    loras = [replace(lora, layouts={TO_Q: layer}) for lora, layer in zip(loras, layers, strict=True)]

    merged = lm.merge(loras, weights="uniform", rank=16)[TO_Q]

    exact = weighted_sum(loras, [1 / 6] * 6, TO_Q)
    optimum = np.linalg.norm(np.linalg.svd(exact, compute_uv=False)[16:])
    assert np.linalg.norm(merged.delta() - exact) <= optimum * 1.0005


def test_bias_is_merged_with_its_weight() -> None:
    loras = [small(modules=(TO_Q,), seed=i, alpha=2) for i in range(2)]
    with_bias = [lm.load({**lora.state_dict("comfyui"), **_bias(lora, i)}) for i, lora in enumerate(loras)]

    merged = lm.merge(with_bias, weights=[0.5, 2.0])

    np.testing.assert_allclose(merged[TO_Q].diff_b, 0.5 * 1 + 2.0 * 2, rtol=1e-6)


def _bias(lora: LoRA, i: int) -> dict[str, np.ndarray]:
    stem = next(key.removesuffix(".lora_up.weight") for key in lora.state_dict("comfyui") if "lora_up" in key)
    return {f"{stem}.diff_b": np.full(lora[TO_Q].shape[0], i + 1.0, dtype=np.float32)}


def test_the_order_of_loras_does_not_matter() -> None:
    a, b = small(seed=1), small(seed=2, rank=6)

    one, other = lm.merge([a, b], weights=[0.3, 0.9]), lm.merge([b, a], weights=[0.9, 0.3])

    for module in one:
        assert linalg.distance(one[module].factors(), other[module].factors()) <= 1e-6 * one[module].norm()


def test_a_plan_reads_no_tensor() -> None:
    def refuse(module: str) -> None:
        raise AssertionError(f"{module} was read")

    loras = [replace(small(seed=i), compute=refuse) for i in range(2)]

    assert len(lm.plan(loras, rank=3).steps) == len(MODULES["sdxl"])


def test_torch_tensors_merge_as_numpy_arrays_do() -> None:
    loras = [small(seed=1), small(seed=2)]
    tensors = [lm.load(lora.state_dict("kohya")) for lora in loras]

    merged, wanted = lm.merge(tensors, rank=3), lm.merge(loras, rank=3)

    for module in wanted:
        assert relative_error(merged[module].delta().numpy(), wanted[module].delta()) <= 1e-4


def test_the_device_is_used() -> None:
    merged = lm.merge([small(seed=1), small(seed=2)], device="cpu", rank=3)

    assert type(merged[TO_Q].up).__module__ == "torch"


@pytest.mark.parametrize("kind", ["dora", "dora-in"])
def test_what_has_no_factors_is_refused_with_the_ways_out(kind: str) -> None:
    with pytest.raises(lm.errors.MergeError, match=r"\(exclude\)"):
        lm.merge([small(kind=kind), small()])


def test_whole_differences_merge_to_a_given_rank() -> None:
    loras = [small(modules=(TO_Q, CONV), kind="full", seed=1), small(modules=(TO_Q, CONV), seed=2)]

    for method, options in (("linear", {}), ("ties", {"density": 1.0})):
        merged = lm.merge(loras, weights=[0.5, 0.5], rank=5, method=method, **options)

        for module in merged:
            exact = weighted_sum(loras, [0.5, 0.5], module).reshape(merged[module].shape[0], -1)
            if method == "linear":
                optimum = np.linalg.norm(np.linalg.svd(exact, compute_uv=False)[5:])
                found = merged[module].delta().reshape(exact.shape)
                assert np.linalg.norm(found - exact) <= 1.01 * optimum
            assert merged[module].rank == 5


@pytest.mark.parametrize("kind", ["dora", "dora-in"])
def test_dora_merges_where_the_base_is_given(kind: str, tmp_path: Path) -> None:
    shape = ARCHITECTURES["sdxl"].shapes[TO_Q]
    weight = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    key = f"model.diffusion_model.{SGM_TO_Q}.weight"
    save_file({key: weight}, tmp_path / "base.safetensors")
    loras = [small(modules=(TO_Q,), kind=kind, seed=1), small(modules=(TO_Q,), seed=2)]

    merged = lm.merge(loras, weights=[0.7, 0.3], rank=640, base=tmp_path / "base.safetensors")

    wanted = 0.7 * loras[0][TO_Q].delta_on(weight) + 0.3 * loras[1][TO_Q].delta()
    assert relative_error(merged[TO_Q].delta(), wanted) <= 1e-4
    with pytest.raises(lm.errors.MergeError, match="this method: its ΔW has no factors"):
        lm.merge(loras, method="tsv", base=tmp_path / "base.safetensors")


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_base_that_is_not_finite_is_refused_by_module(value: float, tmp_path: Path) -> None:
    weight = np.ones(ARCHITECTURES["sdxl"].shapes[TO_Q], np.float16)
    weight[0, 0] = value
    save_file({f"model.diffusion_model.{SGM_TO_Q}.weight": weight}, tmp_path / "base.safetensors")

    with pytest.raises(lm.errors.NumberError, match=f"{TO_Q}: the weight in base.safetensors: a value is NaN or infin"):
        lm.merge([small(modules=(TO_Q,), kind="dora")], rank=4, base=tmp_path / "base.safetensors")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_lora_made_in_memory_that_is_not_finite_is_refused_by_name(dtype: str) -> None:
    loras = [small(dtype=dtype, seed=seed, name=f"lora {seed}") for seed in (1, 2)]
    loras[1][TO_Q].up[0, 0] = np.inf

    for exclude in ((), "text_encoder*"):
        with pytest.raises(lm.errors.NumberError, match=f"lora 2: {TO_Q}: a value is NaN or infinite"):
            lm.merge(loras, exclude=exclude)


def test_excluded_modules_are_left_out() -> None:
    merged = lm.merge([small(seed=1), small(seed=2)], exclude=["text_encoder*"])

    assert set(merged) == {TO_Q, CONV, SHORTCUT}


@pytest.mark.parametrize("algorithm", ["oft", "glora", "ia3"])
@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, 1), "l2"])
def test_a_layer_that_is_only_carried_is_refused_for_what_it_is(algorithm: str, weights: Any) -> None:
    lora = small(seed=1)
    module = next(iter(lora))
    carried = Carried(algorithm=algorithm, held={"a": np.ones((4, 2), np.float32)})
    other = replace(lora, layouts={**lora.layouts, module: carried}, name="other")
    loras = [other] if weights == (1,) else [other, small(seed=2)]

    with pytest.raises(lm.errors.MergeError, match=rf"^other: {module} can't be merged: .*\(exclude\)\.$"):
        lm.merge(loras, weights=weights)

    assert set(lm.merge(loras, weights=weights, exclude=[module])) == set(lora) - {module}
    assert set(lm.merge([other, small(seed=2)], weights=[0, 1])) == set(lora)


def test_two_families_are_refused() -> None:
    with pytest.raises(lm.errors.MergeError, match="different model families"):
        lm.merge([small("sdxl", ("unet.mid_block.attentions.0.proj_in",)), small("sd15")])


def test_two_families_are_named_before_a_module_whose_shapes_differ() -> None:
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"

    with pytest.raises(lm.errors.MergeError, match=r"different model families.* is for sdxl; .* is for sd15"):
        lm.merge([small("sdxl", (module,)), small("sd15", (module,))])


def test_a_dora_layer_asks_for_its_base() -> None:
    with pytest.raises(lm.errors.MergeError, match=r"it is a DoRA layer.*give the base model"):
        lm.merge([small(kind="dora"), small()])


def test_a_text_encoder_merges_into_every_family_that_has_it() -> None:
    text = lm.load(
        small("sd15", ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj",)).state_dict("diffusers")
    )

    merged = lm.merge([small("flux"), text])

    assert merged.architecture == "flux"


def test_shapes_that_differ_are_refused_by_module() -> None:
    other = LoRA(name="narrow", architecture="sdxl", dialect="kohya", layouts={TO_Q: random_layer((640, 320), rank=2)})

    with pytest.raises(lm.errors.MergeError, match=r"attn1\.to_q has the shape"):
        lm.merge([small(modules=(TO_Q,), seed=1), other])


@pytest.mark.parametrize("rank", [0, -1, "all", 2.5, True])
def test_a_wrong_rank_is_refused(rank: object) -> None:
    with pytest.raises(lm.errors.OptionError, match="rank"):
        lm.merge([small()], rank=rank)


def test_an_unknown_method_and_option_are_refused() -> None:
    with pytest.raises(lm.errors.OptionError, match="Did you mean 'linear'"):
        lm.merge([small()], method="liner")
    with pytest.raises(lm.errors.OptionError, match="no option 'density'"):
        lm.merge([small()], density=0.5)


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(lm.errors.MergeError, match="Nothing to merge"):
        lm.merge([])


def test_extras_are_kept_and_conflicts_refused() -> None:
    def with_extra(seed: int, value: float) -> LoRA:
        return lm.load({**small(seed=seed).state_dict("kohya"), "emb_params": np.full(3, value, dtype=np.float32)})

    merged = lm.merge([with_extra(1, 1.0), with_extra(2, 1.0)])

    assert set(merged.extras) == {"emb_params"}
    with pytest.raises(lm.errors.MergeError, match="emb_params"):
        lm.merge([with_extra(1, 1.0), with_extra(2, 2.0)])


def test_an_extra_of_torch_and_an_equal_one_of_numpy_are_one() -> None:
    def given(seed: int, extra: Any) -> LoRA:
        return lm.load({**small(seed=seed).state_dict("kohya"), "emb_params": extra})

    numpy = np.full((2, 3), 0.5, ml_dtypes.bfloat16)

    merged = lm.merge([given(1, numpy), given(2, torch.full((2, 3), 0.5, dtype=torch.bfloat16))])

    assert set(merged.extras) == {"emb_params"}
    for other in (torch.full((2, 3), 0.25, dtype=torch.bfloat16), torch.full((2, 3), 0.5)):
        with pytest.raises(lm.errors.MergeError, match="different tensors 'emb_params'"):
            lm.merge([given(1, numpy), given(2, other)])


def test_a_merge_of_a_state_dict_is_its_own() -> None:
    tensors = small().state_dict("kohya")
    merged = lm.merge([tensors], weights=[1.0])
    norm = merged.norm()

    for tensor in tensors.values():
        tensor.zero_()

    assert merged.norm() == norm > 0


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_a_merge_of_float8_files_is_saved_with_more_digits(dtype: str, tmp_path: Path) -> None:
    given = [small(rank=4, alpha=1.0, seed=i).state_dict("kohya") for i in (1, 2)]
    loras = [lm.load({key: t.to(getattr(torch, dtype)) if t.ndim else t for key, t in each.items()}) for each in given]

    lm.save(lm.merge(loras, weights=[0.7, 0.6]), tmp_path / "both.safetensors")

    saved = lm.load(tmp_path / "both.safetensors")
    for module in saved:
        assert relative_error(saved[module].delta(), weighted_sum(loras, [0.7, 0.6], module)) <= 1e-3


def test_a_merge_of_merges_is_saved_as_the_files_were(tmp_path: Path) -> None:
    half = [lm.load(small(seed=i).state_dict("kohya", dtype="float16")) for i in (1, 2, 3)]

    lm.save(lm.merge([lm.merge(half[:2]), half[2]]), tmp_path / "all.safetensors")

    assert {layer.dtype for layer in lm.load(tmp_path / "all.safetensors").values()} == {"F16"}


def test_overflow_of_the_dtype_is_refused_by_module() -> None:
    lora = lm.merge([small(modules=(TO_Q,), seed=i) for i in (1, 2)], weights=[1e7, 1e7])

    with pytest.raises(lm.errors.NumberError, match=r"attn1_to_q.*too large for float16"):
        lora.state_dict("kohya", dtype="float16")


def test_a_lora_of_which_all_is_excluded_adds_nothing() -> None:
    merged = lm.merge([small(seed=1), small(modules=(TEXT,), kind="full")], weights=[1, 1], exclude=["text_encoder*"])

    assert set(merged) == {TO_Q, CONV, SHORTCUT}


def test_excluding_everything_or_nothing_is_refused() -> None:
    with pytest.raises(lm.errors.OptionError, match="Nothing is left"):
        lm.merge([small()], exclude=["*"])
    with pytest.raises(lm.errors.OptionError, match="No module matches"):
        lm.merge([small()], exclude=["vae*"])


def test_an_average_of_factors_needs_equal_ranks_already_in_the_plan() -> None:
    with pytest.raises(lm.errors.MergeError, match="equal ranks, got 4, 6"):
        lm.plan([small(rank=4), small(rank=6)], method="factor_average")


def test_torch_and_numpy_merge_together() -> None:
    a, b = small(seed=1), small(seed=2)

    merged = lm.merge([lm.load(a.state_dict("kohya")), b])

    for module in merged:
        assert relative_error(merged[module].delta().numpy(), weighted_sum([a, b], [1, 1], module)) <= 1e-6


@pytest.mark.parametrize("weights", [np.array([0.5, 0.25]), [np.float32(0.5), np.float64(0.25)], ("0.5", "0.25")])
def test_numbers_of_every_kind_are_weights(weights: object) -> None:
    merged = lm.merge([small(seed=1), small(seed=2)], weights=weights, rank=np.int64(3), exclude="text_encoder")

    assert {layer.rank for layer in merged.values()} == {3}
    assert TEXT not in merged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loras": "a.safetensors"}, "Give a list"),
        ({"weights": 0.5}, "one entry per LoRA"),
        ({"weights": [None, 0.5]}, "Can't read the weight"),
        ({"scope": "whole"}, "goes with weights by a rule on norms"),
        ({"weights": ["0.7;0.5", 1]}, "twice"),
    ],
)
def test_arguments_of_the_wrong_kind_are_explained(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(lm.errors.OptionError, match=message):
        lm.merge(**{"loras": [small(), small(seed=1)], **arguments})


def test_a_family_that_does_not_fit_is_refused() -> None:
    with pytest.raises(lm.errors.OptionError, match="isn't a LoRA of flux"):
        lm.load(small().state_dict("kohya"), architecture="flux")


def test_loading_a_state_dict_copies_it() -> None:
    keys = small().state_dict("kohya")
    lora = lm.load(keys)
    before = lora.norm()

    for tensor in keys.values():
        tensor.mul_(0)

    assert lora.norm() == before


def test_plans_and_loras_are_short_to_print() -> None:
    plan = lm.plan([small(seed=1), small(seed=2)])

    assert len(repr(plan)) < 300
    assert len(repr(plan.lora())) < 300
    assert len(repr(small()[TO_Q])) < 300


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
def test_a_merge_may_take_the_place_of_an_input(dialect: str, tmp_path: Path) -> None:
    paths = [
        lm.save(small(modules=(TO_Q,), seed=seed), tmp_path / f"{seed}.safetensors", dialect=dialect) for seed in (1, 2)
    ]
    wanted = lm.merge(paths)

    lm.save(lm.plan(paths).lora(), paths[0], dialect=dialect)

    assert relative_error(lm.load(paths[0])[TO_Q].delta(), wanted[TO_Q].delta()) <= 1e-6
    assert len(list(tmp_path.iterdir())) == 2


def narrow(dialect: str, modules: tuple[str, ...] = (TO_Q,)) -> LoRA:
    """A LoRA of which only the names are SDXL's: its weights are narrower."""
    shapes = {module: random_layer((32, 32), rank=2, seed=seed) for seed, module in enumerate(modules)}
    return lm.load(LoRA(name="toy", architecture="sdxl", dialect=dialect, layouts=shapes).state_dict(dialect))


def test_unknown_families_in_two_dialects_are_merged_once_the_family_is_named() -> None:
    first, second = narrow("kohya"), narrow("diffusers-peft")

    with pytest.raises(lm.errors.MergeError, match=r"shares no module.*architecture="):
        lm.plan([first, second])

    named = [lm.load(lora.state_dict(), architecture="sdxl") for lora in (first, second)]
    assert set(lm.merge(named)) == {TO_Q}


def test_unknown_families_that_share_no_module_merge_only_where_their_metadata_agrees() -> None:
    first, second = narrow("kohya"), narrow("kohya", (TO_Q.replace("to_q", "to_k"),))
    said = {"modelspec.architecture": "a-new-omnigen/lora"}

    with pytest.raises(lm.errors.MergeError, match=r"shares no module.*architecture="):
        lm.plan([first, second])

    assert len(lm.plan([replace(lora, metadata=said) for lora in (first, second)]).steps) == 2


def test_a_known_and_an_unknown_family_are_refused_with_the_way_out() -> None:
    with pytest.raises(lm.errors.MergeError, match=r"different model families.*architecture=") as refused:
        lm.plan([small(), narrow("kohya")])

    assert len(str(refused.value)) < 500  # sixty families would hide the way out


@pytest.mark.parametrize(("name", "place"), [("dialect", "save"), ("to", "save"), ("architecture", "open")])
def test_an_argument_of_another_function_is_sent_there(name: str, place: str) -> None:
    with pytest.raises(lm.errors.OptionError, match=rf"{name!r}: it goes to {place}\("):
        lm.merge([small()], **{name: "sdxl"})


def test_weights_that_are_too_few_are_explained_in_the_callers_words() -> None:
    with pytest.raises(lm.errors.OptionError, match=r"weights=\[0\.7, 0\.5\]"):
        lm.merge([small(), small(seed=1)], weights=[1.0])


@pytest.mark.parametrize(("options", "times"), [({}, 1), ({"max_error": 0.1}, 2)])
def test_progress_is_told_of_every_module(options: dict[str, Any], times: int) -> None:
    seen: list[tuple[int, int]] = []
    lora = small()

    lm.merge([lora, small(seed=2)], progress=lambda *at: seen.append(at), **options)
    lm.resize(lora, rank=1, progress=lambda *at: seen.append(at))

    assert seen == [(i, len(lora)) for i in range(1, len(lora) + 1)] * (times + 1)


def test_every_error_has_one_root_at_the_top() -> None:
    named = [kind for kind in vars(lm.errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in named if kind.__module__ == lm.errors.__name__]

    assert "LoRAMergeError" in dir(lm)
    assert all(issubclass(kind, lm.LoRAMergeError) for kind in kinds)
