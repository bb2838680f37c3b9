"""Weights mean what they say, module by module."""

import gzip
import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import loramerge as lm
from listings import DATA
from loramerge.files.architectures import ARCHITECTURES, blocks
from loramerge.files.architectures.blocks import Selector
from loramerge.files.lora import LoRA
from loramerge.layers import BiasOnly
from loramerge.merging.weights import parse, resolve
from loramerge.testing import random_lora, relative_error, weighted_sum
from small import MODULES, small

TO_Q, CONV, SHORTCUT, TEXT = MODULES["sdxl"]


def test_uniform_is_one_over_n_and_no_weights_are_the_sum() -> None:
    loras = [small(seed=i) for i in range(4)]

    assert resolve(loras, "uniform").of(TO_Q) == [0.25] * 4
    assert resolve(loras, None).of(TO_Q) == [1.0] * 4


def test_l2_is_each_ones_share_of_the_norms_a_module() -> None:
    loras = [small(seed=1, alpha=8), small(seed=2, alpha=1)]
    norms = [np.linalg.norm(lora[TO_Q].delta().astype(np.float64)) for lora in loras]

    found = resolve(loras, "l2").of(TO_Q)

    np.testing.assert_allclose(found, np.array(norms) / sum(norms), rtol=1e-6)


@pytest.mark.parametrize(("scope", "group"), [("component", (TO_Q, CONV, SHORTCUT)), ("whole", MODULES["sdxl"])])
def test_l2_over_a_scope_takes_the_norm_of_all_its_modules(scope: str, group: tuple[str, ...]) -> None:
    loras = [small(seed=1, alpha=8), small(seed=2, alpha=1)]
    norms = [np.sqrt(sum((lora[m].delta().astype(np.float64) ** 2).sum() for m in group)) for lora in loras]

    found = resolve(loras, "l2", scope).of(TO_Q)

    np.testing.assert_allclose(found, np.array(norms) / sum(norms), rtol=1e-6)


@pytest.mark.parametrize("rule", ["l2", "equal", "energy", "energy-sum"])
def test_a_rule_on_norms_takes_torch_and_numpy_together(rule: str) -> None:
    a, b = small(seed=1, alpha=8), small(seed=2, alpha=1)

    found = resolve([lm.load(a.state_dict("kohya")), b], rule).of(TO_Q)

    np.testing.assert_allclose(found, resolve([a, b], rule).of(TO_Q), rtol=1e-5)


def test_l2_gives_a_module_that_one_has_to_that_one() -> None:
    assert resolve([small(), small(modules=(CONV,))], "l2").of(TO_Q) == [1.0, 0.0]


def test_l2_merges_a_module_that_is_zero_everywhere() -> None:
    lora = small(alpha=0.0)

    assert not lm.merge([lora, lora], weights="l2")[TO_Q].delta().any()


@pytest.mark.parametrize(("rule", "weight"), [("uniform", 1 / 3), ("sum", 1.0), ("sqrt", 3**-0.5)])
def test_rules_on_the_number_of_loras_give_each_the_same(rule: str, weight: float) -> None:
    loras = [small(seed=i) for i in range(3)]

    merged = lm.merge(loras, weights=rule)

    assert resolve(loras, rule).of(TO_Q) == pytest.approx([weight] * 3)
    assert relative_error(merged[TO_Q].delta(), weighted_sum(loras, [weight] * 3, TO_Q)) <= 1e-6


def of_kinds() -> list[lm.LoRA]:
    """Three LoRAs of different kinds, strengths and modules; the first has no convolution, the second no text encoder."""
    return [
        small(seed=1, alpha=8, modules=(TO_Q, SHORTCUT, TEXT)),
        small(seed=2, kind="lokr", alpha=2, modules=(TO_Q, CONV, SHORTCUT)),
        small(seed=3, kind="full", modules=(TO_Q, CONV, TEXT)),
    ]


def groups(scope: str) -> list[tuple[str, ...]]:
    return {
        "module": [(module,) for module in MODULES["sdxl"]],
        "component": [(TO_Q, CONV, SHORTCUT), (TEXT,)],
        "whole": [MODULES["sdxl"]],
    }[scope]


def updates(loras: list[lm.LoRA], modules: tuple[str, ...]) -> list[np.ndarray]:
    """Each LoRA's ΔW of some modules in one row, float64; zeros where it has none."""
    return [
        np.concatenate(
            [
                lora[m].delta().astype(np.float64).ravel()
                if m in lora
                else np.zeros(next(other for other in loras if m in other)[m].delta().size)
                for m in modules
            ]
        )
        for lora in loras
    ]


@pytest.mark.parametrize("scope", [None, "module", "component", "whole"])
@pytest.mark.parametrize(("rule", "share"), [("energy", "mean"), ("energy-sum", "sum")])
def test_energy_keeps_the_mean_or_the_sum_of_the_energies(rule: str, share: str, scope: str | None) -> None:
    loras = of_kinds()
    found = resolve(loras, rule, scope)

    for modules in groups(scope or "whole"):
        rows = updates(loras, modules)
        weights = np.array(found.of(modules[0]))
        acting = [row @ row for row in rows if row.any()]
        assert all(found.of(module) == found.of(modules[0]) for module in modules)
        assert len({*weights}) == 1
        np.testing.assert_allclose(np.sum((weights @ rows) ** 2), getattr(np, share)(acting), rtol=1e-6)


def test_energy_counts_a_bias_alone_beside_a_loras_update() -> None:
    one = small(modules=(TO_Q,))
    bias = replace(one, layouts={TO_Q: BiasOnly(diff_b=np.full(one[TO_Q].shape[0], 2.0, np.float32))})

    weights = resolve([one, bias], "energy-sum").of(TO_Q)

    assert weights == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("scope", [None, "module", "component", "whole"])
def test_equal_makes_the_updates_equally_strong_and_their_sum_one_over_root_n(scope: str | None) -> None:
    loras = of_kinds()
    found = resolve(loras, "equal", scope)

    for modules in groups(scope or "whole"):
        norms = np.array([np.linalg.norm(row) for row in updates(loras, modules)])
        acting = norms > 0
        strength = np.sqrt(np.mean(norms[acting] ** 2) / acting.sum())
        np.testing.assert_allclose(np.array(found.of(modules[0])) * norms, np.where(acting, strength, 0), rtol=1e-6)


@pytest.mark.parametrize("rule", ["l2", "equal", "energy", "energy-sum"])
def test_one_lora_by_a_rule_on_norms_is_itself(rule: str) -> None:
    assert resolve([small()], rule).of(TO_Q) == pytest.approx([1.0])


@pytest.mark.parametrize("rule", ["l2", "equal", "energy", "energy-sum"])
def test_loras_that_are_zero_stay_zero(rule: str) -> None:
    zero = small(alpha=0.0)

    assert not lm.merge([zero, zero], weights=rule)[TO_Q].delta().any()


def test_energy_of_loras_that_cancel_each_other_is_refused() -> None:
    lora = small()

    with pytest.raises(lm.errors.MergeError, match=r"whole.*cancel.*--weights sqrt"):
        lm.merge([lora, lm.merge([lora], weights=[-1])], weights="energy")


def test_energy_of_loras_that_nearly_cancel_each_other_is_kept() -> None:
    lora = small()
    loras = [lora, lm.merge([lora], weights=[-0.999])]

    merged = lm.merge(loras, weights="energy", rank=4)

    rows = updates(loras, MODULES["sdxl"])
    (kept,) = updates([merged], MODULES["sdxl"])
    np.testing.assert_allclose(kept @ kept, np.mean([row @ row for row in rows]), rtol=1e-3)


def test_rules_ignore_how_a_lora_is_stored() -> None:
    as_lokr = small(seed=2, kind="lokr", alpha=2)
    written_out = lm.merge([as_lokr], weights=[1.0])

    assert resolve([small(), as_lokr], "energy").of(TO_Q) == pytest.approx(
        resolve([small(), written_out], "energy").of(TO_Q), rel=1e-6
    )


def test_patterns_weigh_components_blocks_and_names() -> None:
    weight = {"*": 0.5, "text_encoder": 0.0, "IN01": 0.7, "re:conv_short": 0.9}
    loras = [small(seed=1), small(seed=2)]

    merged = lm.merge(loras, weights=[weight, 1.0])

    for module, w in {TO_Q: 0.5, CONV: 0.7, SHORTCUT: 0.9, TEXT: 0.0}.items():
        assert relative_error(merged[module].delta(), weighted_sum(loras, [w, 1.0], module)) <= 1e-6


def test_a_module_that_no_pattern_means_keeps_its_strength() -> None:
    assert resolve([small()], [{"text_encoder": 0.2}]).of(TO_Q) == [1.0]


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("0.5", 0.5),
        ("-2", -2.0),
        ("=-2", -2.0),
        ("0.5;text_encoder=0", {"*": 0.5, "text_encoder": 0.0}),
        ("unet.up*=1; OUT03 = .3", {"unet.up*": 1.0, "OUT03": 0.3}),
        ("lbw:1,0", "lbw:1,0"),
        ("0.3..1", {"*": "0.3..1"}),
        ("0.123456789 .. 1e-7", {"*": "0.123456789..1e-7"}),
        ("0..-1.5;text_encoder=0; OUT* = 1..2", {"*": "0..-1.5", "text_encoder": 0.0, "OUT*": "1..2"}),
    ],
)
def test_weights_are_read_as_they_are_typed(text: str, weight: object) -> None:
    assert parse(text) == weight


@pytest.mark.parametrize(
    "text", ["half", "0.5;", "nan", "inf", "text_encoder=", "", "0..", "0..1..2", "..", "0..x", "nan..1", "0.3...1"]
)
def test_what_is_no_weight_is_refused(text: str) -> None:
    with pytest.raises(lm.errors.OptionError, match="weight"):
        parse(text)


def test_a_word_that_is_no_weight_is_told_the_rules() -> None:
    with pytest.raises(lm.errors.OptionError, match=r"uniform, sum, sqrt, .* Did you mean 'energy'"):
        parse("energie")


@pytest.mark.parametrize(
    "table",
    [
        {"text_encoder": 0, "*": 0.8},
        {"unet.down_blocks.1.*": 0.5, "unet": 1},
        {"*conv1": 0.5, "unet.down_blocks.0.*": 0.3, "unet": 1},
        {"@shared": 0.5, "*": 1},
    ],
)
def test_a_pattern_that_a_more_general_one_overrides_everywhere_is_refused(table: dict[str, float]) -> None:
    loras = [small(), small(seed=1, modules=MODULES["sdxl"][:1])]
    special, *_, general = table

    with pytest.raises(lm.errors.OptionError, match="is never used") as refused:
        lm.plan(loras, weights=[table, 1.0])

    assert f"Way out: {general!r} first, then {special!r}" in str(refused.value)
    assert lm.plan(loras, weights=[dict(reversed(table.items())), 1.0])


def test_a_rule_in_place_of_a_weight_is_named_with_its_option() -> None:
    with pytest.raises(lm.errors.OptionError, match=r"sqrt is a rule .*--weights sqrt"):
        parse("sqrt")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5], "Weights given: 1, LoRAs: 2"),
        ([0.5, float("nan")], "not finite"),
        ([0.5, {"vae": 1.0}], "matches no module"),
        ([0.5, {"re:(": 1.0}], "not a regular expression"),
        ([0.5, "lbw:1,2,3"], "a block vector of 3 numbers|A block vector of 3 numbers"),
        ("l3", "Unknown weights"),
    ],
)
def test_wrong_weights_are_refused(weights: object, message: str) -> None:
    with pytest.raises(lm.errors.OptionError, match=message):
        lm.plan([small(), small(seed=1)], weights=weights).lora().in_memory()


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(lm.errors.OptionError, match="scope"):
        lm.plan([small()], weights="l2", scope="planet")


NUMBERS = {"sd1": ("sd15", "sgm_sd1"), "sdxl": ("sdxl", "sgm_sdxl")}


@pytest.mark.parametrize("family", NUMBERS)
def test_blocks_are_sgms(family: str) -> None:
    architecture, file = NUMBERS[family]
    published = json.loads(gzip.decompress((DATA / "maps" / f"{file}.json.gz").read_bytes()))["unet"]

    for native, path in published.items():
        section, number, *_ = [*native.split("."), "0"]
        wanted = {"input_blocks": f"IN{number:0>2}", "middle_block": "MID", "output_blocks": f"OUT{number:0>2}"}
        assert blocks.block(f"unet.{path}", architecture) == wanted.get(section, "-")


@pytest.mark.parametrize(
    ("architecture", "length"),
    [(a, n) for a in ARCHITECTURES for n in blocks.vectors(a)],
)
def test_a_block_vector_has_a_number_for_each_of_its_blocks(architecture: str, length: int) -> None:
    weights = blocks.vector(list(range(length)), architecture)

    assert sorted(set(weights.values())) == list(range(length))


def test_a_block_vector_weighs_each_block_by_its_number() -> None:
    lora = small("sd15")
    numbers = ",".join(str(n) for n in range(17))

    found = resolve([lora], [f"lbw:{numbers}"])

    assert [found.of(m)[0] for m in MODULES["sd15"]] == [1.0, 14.0, 0.0]


@pytest.mark.parametrize(
    ("family", "length", "start"), [("sdxl", 20, 1), ("sd15", 26, 1), ("flux", 58, 1), ("wan-14b", 0, 0)]
)
def test_a_ramp_is_the_block_vector_of_a_straight_line(family: str, length: int, start: int) -> None:
    lora = random_lora(family, rank=1, only=lambda module, _: blocks.block(module, family) not in ("-", "IN", "OUT"))
    length = length or min(blocks.vectors(family))
    line = np.linspace(0.25, 1.5, length - start)
    numbers = ",".join(map(repr, [*[0.25] * start, *line.tolist()]))

    ramp, vector = resolve([lora], ["0.25..1.5"]), resolve([lora], [f"lbw:{numbers}"])

    assert len({ramp.of(module)[0] for module in lora}) > 5
    np.testing.assert_allclose([ramp.of(m) for m in lora], [vector.of(m) for m in lora], rtol=1e-12)


def test_a_ramp_stands_in_a_table_where_a_number_does() -> None:
    lora = small("sd15")

    found = resolve([lora], [{"*": "0..1", "text_encoder": 0.5, "OUT*": "1..3"}])

    first, last, text = (found.of(module)[0] for module in MODULES["sd15"])
    assert (first, last, text) == (1 / 24, 1 + 2 * 22 / 24, 0.5)
    assert resolve([lora], list(found.given)).of(MODULES["sd15"][1]) == [last]
    assert found.label == ("*=0..1;text_encoder=0.5;OUT*=1..3",)


def test_a_ramp_needs_a_family() -> None:
    unknown = LoRA(name="mine", architecture=None, dialect="kohya", layouts={TO_Q: small()[TO_Q]})

    with pytest.raises(lm.errors.OptionError, match="family of mine isn't known"):
        resolve([unknown], ["0..1"]).of(TO_Q)


def test_shared_modules_and_those_of_one_lora_alone_weigh_apart() -> None:
    loras = [small(seed=1), small(seed=2, modules=(TO_Q, CONV)), small(seed=3, modules=(CONV, TEXT))]

    merged = lm.merge(
        loras, weights=[{"*": 1.0, "@shared": 0.5}, {"@shared": 3.0}, {"@shared": 0.25, "text_encoder": 0.0}]
    )

    for module, weights in {TO_Q: [0.5, 3, 0], CONV: [0.5, 3, 0.25], SHORTCUT: [1, 0, 0], TEXT: [0.5, 0, 0]}.items():
        given = [(lora, w) for lora, w in zip(loras, weights, strict=True) if module in lora]
        wanted = weighted_sum([lora for lora, _ in given], [w for _, w in given], module)
        assert relative_error(merged[module].delta(), wanted) <= 1e-6


def test_a_lora_that_is_given_twice_shares_all_its_modules_with_itself() -> None:
    lora = small()

    merged = lm.merge([lora, lora], weights=[{"*": 1.0, "@shared": 0.5}, 1.0])

    assert relative_error(merged[TO_Q].delta(), 1.5 * lora[TO_Q].delta()) <= 1e-6


def test_a_pattern_for_what_one_lora_has_alone_matches_nothing_if_it_has_nothing_alone() -> None:
    with pytest.raises(lm.errors.OptionError, match=r"'@alone' matches no module of .*: all 4 are in another LoRA too"):
        resolve([small(seed=1), small(seed=2)], [{"@alone": 0.0}, 1.0])
    assert resolve([small()], [{"@alone": 2.0}]).of(TO_Q) == [2.0]


def test_ramps_and_shared_modules_go_through_a_recipe_and_a_merged_files_own(tmp_path: Path) -> None:
    files = [lm.save(small(seed=i), tmp_path / f"{i}.safetensors") for i in (1, 2)]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[[loras]]\npath = '1.safetensors'\nweight = '0.2..1'\n"
        "[[loras]]\npath = '2.safetensors'\nweight = { '*' = '1..0', '@shared' = 0.5 }\n"
    )

    made = lm.Recipe.read(recipe).run(tmp_path / "out.safetensors")
    direct = lm.merge(files, weights=["0.2..1", {"*": "1..0", "@shared": 0.5}])
    assert all((lm.load(made)[m].delta() == direct[m].delta()).all() for m in direct)
    assert lm.Recipe.of(lm.load(made)).weights == ({"*": "0.2..1"}, {"*": "1..0", "@shared": 0.5})


def test_a_block_vector_without_a_number_for_a_module_is_refused() -> None:
    with pytest.raises(lm.errors.OptionError, match="no number for block IN01"):
        lm.merge([small()], weights=["lbw:" + ",".join("1" * 12)])


@pytest.mark.parametrize(
    ("block", "module"),
    [
        ("D18", "transformer.transformer_blocks.18.attn.to_q"),
        ("S37", "transformer.single_transformer_blocks.37.proj_out"),
        ("IN", "transformer.x_embedder"),
        ("OUT", "transformer.norm_out.linear"),
        ("CLIP", "text_encoder.text_projection"),
        ("T5", "text_encoder_2.shared"),
    ],
)
def test_flux_blocks_are_counted_in_their_own_rows(block: str, module: str) -> None:
    assert blocks.block(module, "flux") == block


@pytest.mark.parametrize(("pattern", "module"), list(product(["unet", "unet.*", "re:to_q$", "IN04", "IN*"], [TO_Q])))
def test_patterns_match(pattern: str, module: str) -> None:
    assert Selector([pattern]).matching(module)
    assert not Selector([pattern]).matching(TEXT)


def test_blora_takes_what_is_drawn_from_one_block_and_how_from_the_next() -> None:
    content = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    style = "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
    loras = [small(modules=(content, style, TO_Q), seed=i) for i in range(2)]

    merged = lm.merge(loras, weights=["blora:content", "blora:style"])

    assert relative_error(merged[content].delta(), loras[0][content].delta()) < 1e-6
    assert relative_error(merged[style].delta(), loras[1][style].delta()) < 1e-6
    assert set(merged) == {content, style}


@pytest.mark.parametrize("architecture", ["sdxl", "flux"])
def test_a_pattern_that_matches_nothing_is_told_those_that_do(architecture: str) -> None:
    lora = small(architecture)
    refusals = (
        lambda: lm.plan([lora], weights=[{"*": 0, "up": 0.6}]),
        lambda: lm.plan([lora], exclude=["output_blocks*"]),
        lambda: lora.exclude("up"),
        lambda: lora.select("up"),
    )
    for refused in refusals:
        with pytest.raises(lm.LoRAMergeError, match="Patterns that do: blocks ") as caught:
            refused()
        named = re.findall(r"[\w.]+\*|\b[A-Z]+\d*\b", str(caught.value).partition("blocks ")[2])
        assert len(named) > 2
        assert all(any(Selector([p], architecture).matching(m) for m in lora) for p in named)


def test_blocks_that_follow_each_other_are_told_as_a_run() -> None:
    modules = [f"transformer.transformer_blocks.{i}.attn.to_q" for i in (0, 1, 2, 3, 5)]

    assert "blocks D00 to D03, D05; sections transformer.transformer_blocks.*" in blocks.offered(modules, "flux")
    assert blocks.offered(["x.y"]) == "Its modules are such as x.y."
