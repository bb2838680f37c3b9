"""Other numbers for the blocks of a LoRA."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import loramerge as lm
from loramerge.cli.app import app
from loramerge.errors import DialectError, LoRAMergeError, MergeError, OptionError
from loramerge.files.renumbering import renumbered
from loramerge.testing import random_lora


def file(folder: Path, names: str = "diffusion_model.blocks.{}.mlp.fc", count: int = 4) -> Path:
    rng = np.random.default_rng(0)
    keys = {}
    for i in range(count):
        keys[f"{names.format(i)}.lora_down.weight"] = rng.standard_normal((2, 16), dtype=np.float32)
        keys[f"{names.format(i)}.lora_up.weight"] = rng.standard_normal((8, 2), dtype=np.float32)
    keys["other.lora_down.weight"], keys["other.lora_up.weight"] = (
        np.ones((1, 4), np.float32),
        np.ones((3, 1), np.float32),
    )
    return lm.save(lm.load(keys), folder / "a.safetensors")


@pytest.mark.parametrize(
    "names", ["diffusion_model.blocks.{}.mlp.fc", "lora_unet_blocks_{}_mlp_fc", "blocks.{}.mlp.fc"]
)
@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ({"blocks.{i}": "blocks.{i+12}"}, {0: 12, 1: 13, 2: 14, 3: 15}),
        ({"blocks.{i}": "layers.{i-2}"}, {2: 0, 3: 1}),
        ({"blocks.{i}": "blocks.{i*40/28}"}, {0: 0, 1: 1, 2: 2, 3: 4}),
        ({"blocks.0": "blocks.0", "blocks.3": "blocks.1"}, {0: 0, 3: 1}),
    ],
)
def test_each_block_keeps_its_update_under_its_new_number(
    tmp_path: Path, names: str, rules: dict[str, str], wanted: dict[int, int]
) -> None:
    before = lm.load(file(tmp_path, names))

    after = renumbered(before, rules)

    old, new = next(iter(rules)).partition(".")[0], next(iter(rules.values())).partition(".")[0]
    stems = {module.replace("_", "."): module for module in after}
    for i, j in wanted.items():
        module = next(m for m in before if f"{old}.{i}." in m.replace("_", "."))
        found = stems[module.replace("_", ".").replace(f"{old}.{i}.", f"{new}.{j}.")]
        np.testing.assert_array_equal(after[found].delta(), before[module].delta())
    assert len(after) == len(wanted) + 1
    assert any("left out" in note for note in after.notes) == (len(wanted) < 4)


def test_the_command_writes_the_map_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    source, target = file(tmp_path), tmp_path / "b.safetensors"

    done = CliRunner().invoke(
        app, ["convert", str(source), "-o", str(target), "--to", "comfyui", "--map", "blocks.{i}=blocks.{i-1}"]
    )

    assert done.exit_code == 0, done.output
    assert "left out: 2 tensors of blocks" in done.output
    assert [module for module in lm.open(target) if "blocks" in module] == [
        f"transformer.blocks.{i}.mlp.fc" for i in range(3)
    ]


def test_a_map_past_the_last_block_is_told_as_such_and_not_as_an_unknown_family(tmp_path: Path) -> None:
    source = lm.save(random_lora("flux"), tmp_path / "a.safetensors", dialect="kohya")
    past = {"double_blocks.{i}": "double_blocks.{i+60}"}

    with pytest.raises(
        DialectError, match=r"blocks that FLUX\.1 \(flux\) doesn't have: .*double_blocks_60.*kohya, which"
    ):
        lm.convert(source, tmp_path / "b.safetensors", "comfyui", block_map=past)

    (note,) = [note for note in renumbered(lm.load(source), past, "kohya").notes if "family" in note or "FLUX" in note]
    assert "doesn't have" in note


def bare(architecture: str, dialect: str, folder: Path) -> Path:
    """A file without metadata, so that only the layers tell its family."""
    tensors = {key: tensor.numpy() for key, tensor in random_lora(architecture).state_dict(dialect).items()}
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors"


ONE_UP = {f"{name}.{{i}}": f"{name}.{{i+1}}" for name in ("transformer_blocks", "single_transformer_blocks")}


def test_a_file_of_several_families_is_written_for_the_one_that_is_named(tmp_path: Path) -> None:
    """Their names in kohya's files differ: those with the map are those without it, but for the numbers."""
    source = bare("hunyuanvideo", "diffusers-peft", tmp_path)
    assert len(renumbered(lm.load(source), ONE_UP).families) > 1

    plain, moved = (
        load_file(lm.convert(source, tmp_path / "b.safetensors", "kohya", architecture="hunyuanvideo", block_map=rules))
        for rules in (None, ONE_UP)
    )

    wanted = {key.replace("_blocks_0_", "_blocks_1_"): tensor for key, tensor in plain.items()}
    assert moved.keys() == wanted.keys() != plain.keys()
    assert all((moved[key] == wanted[key]).all() for key in wanted)


def test_a_family_that_a_dialect_has_no_names_for_is_refused_with_a_map_as_without(tmp_path: Path) -> None:
    source = bare("longcat-image", "diffusers-peft", tmp_path)

    for rules in (None, ONE_UP):
        with pytest.raises(DialectError, match=r"comfyui has no name for the module .* of longcat-image"):
            lm.convert(source, tmp_path / "b.safetensors", "comfyui", architecture="longcat-image", block_map=rules)


def test_a_block_that_only_another_family_has_is_not_one_of_the_family_that_is_named(tmp_path: Path) -> None:
    """FLUX.1 has 19 double blocks and HunyuanVideo 20, of the same names and shapes."""
    source = bare("flux", "kohya", tmp_path)
    past = {"double_blocks.{i}": "double_blocks.{i+19}"}

    with pytest.raises(DialectError, match=r"blocks that FLUX\.1 \(flux\) doesn't have: .*double_blocks_19"):
        lm.convert(source, tmp_path / "b.safetensors", "comfyui", architecture="flux", block_map=past)

    moved = load_file(lm.convert(source, tmp_path / "c.safetensors", "kohya", architecture="flux", block_map=past))
    assert moved.keys() == {key.replace("double_blocks_0_", "double_blocks_19_") for key in load_file(source)}


def ranked(module: str) -> int:
    return 2 if ".0." in module else 3


def scaled(module: str) -> float:
    return 6.0 if ".0." in module else 1.0


@pytest.mark.parametrize("dialect", ["peft", "diffusers-peft"])
@pytest.mark.parametrize("to", ["peft", "diffusers-peft", "kohya"])
def test_a_block_takes_its_own_rank_and_scale_out_of_a_configuration_along(
    dialect: str, to: str, tmp_path: Path
) -> None:
    some = random_lora(
        "wan-1.3b", rank=ranked, alpha=scaled, only=lambda m, s: ".attn1.to_q" in m and m.split(".")[2] in "0123"
    )
    path = lm.save(some, tmp_path / "a.safetensors", dialect=dialect)

    again = lm.load(lm.convert(path, tmp_path / "b.safetensors", to, block_map={"blocks.{i}": "blocks.{i+2}"}))

    assert len(again) == len(some)
    for module in some:
        new = module.replace(f"blocks.{module.split('.')[2]}.", f"blocks.{int(module.split('.')[2]) + 2}.")
        np.testing.assert_allclose(again[new].delta(), some[module].delta(), rtol=1e-6, atol=1e-6)


def test_patterns_of_a_configuration_are_about_the_old_numbers() -> None:
    shape = {"lora_A": (4, 1536), "lora_B": (1536, 4)}
    keys = {
        f"base_model.model.blocks.{i}.attn1.to_q.{end}.weight": np.ones(size, np.float32)
        for i in range(3)
        for end, size in shape.items()
    }
    lora = lm.load(
        keys, config={"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": {r"blocks\.[12]\..*": 8}}
    )

    moved = renumbered(lora, {"blocks.{i}": "blocks.{i+1}"})

    assert [moved[f"transformer.blocks.{i}.attn1.to_q"].own_alpha for i in (1, 2, 3)] == [4, 8, 8]


def test_two_blocks_change_places(tmp_path: Path) -> None:
    before = lm.load(file(tmp_path))

    after = renumbered(before, {"blocks.0": "blocks.1", "blocks.1": "blocks.0", "blocks.{i}": "blocks.{i}"})

    for i, j in enumerate((1, 0, 2, 3)):
        old, new = (f"transformer.blocks.{number}.mlp.fc" for number in (i, j))
        np.testing.assert_array_equal(after[new].delta(), before[old].delta())


@pytest.mark.parametrize(
    ("rules", "error", "said"),
    [
        ({"blocks.{i}": "blocks.{j}"}, OptionError, "has to be said with i"),
        ({"blocks": "blocks.{i}"}, OptionError, "Can't read the map 'blocks=blocks.{i}'"),
        ({"layers.{i}": "layers.{i+1}"}, OptionError, "changes nothing; the file's names are such as diffusion_model"),
        ({"blocks.{i}": "blocks.{i*1/2}"}, DialectError, "two blocks would have the tensor"),
        ({"blocks.1": "blocks.2", "blocks.2": "blocks.2"}, DialectError, "two blocks would have the tensor"),
    ],
)
def test_a_map_that_says_too_little_is_refused(
    tmp_path: Path, rules: dict[str, str], error: type[LoRAMergeError], said: str
) -> None:
    with pytest.raises(error) as raised:
        renumbered(lm.load(file(tmp_path)), rules)

    assert said in str(raised.value)


def test_a_renumbered_merge_is_not_what_its_recipe_makes(tmp_path: Path) -> None:
    merged = lm.save(lm.merge([file(tmp_path)]), tmp_path / "merged.safetensors")

    with lm.open(merged) as lora:
        found = renumbered(lora, {"blocks.0": "blocks.0", "blocks.3": "blocks.1"})
        assert lm.Recipe.of(lora)

    with pytest.raises(MergeError, match="changed since"):
        lm.Recipe.of(found)
