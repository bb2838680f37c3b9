"""What others made to break us is refused with a reason, or read right; and nothing in it is run."""

import re
from pathlib import Path

import numpy as np
import pytest

import loramerge as lm
from hostile.attacks import ATTACKS, MARK, Attack
from loramerge.files.reading import IN_MEMORY
from loramerge.merging.recipe import Recipe
from small import small

SMALL = [name for name, attack in ATTACKS.items() if not attack.large]


def opened(attack: Attack, path: Path) -> object:
    """Everything that the attack is about, read."""
    if attack.recipe:
        return Recipe.read(path).plan()
    lora = lm.load(path, allow_pickle=attack.allow_pickle)
    return [layer.factors() for layer in lora.values()]


@pytest.mark.parametrize("name", SMALL)
def test_an_attack_is_refused_with_its_reason_or_read_right(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = ATTACKS[name]
    path = attack.make(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    if attack.refused is None:
        assert opened(attack, path)
    else:
        with pytest.raises(lm.errors.LoRAMergeError, match=attack.refused) as caught:
            opened(attack, path)
        assert str(caught.value)
    assert not Path(MARK).exists()


@pytest.mark.parametrize("name", SMALL)
def test_a_file_in_memory_is_taken_as_on_the_disk(name: str, tmp_path: Path) -> None:
    path = ATTACKS[name].make(tmp_path)
    if not path.is_file() or path.suffix != ".safetensors":
        pytest.skip("isn't a file of tensors alone")

    said = [outcome(source) for source in (path, path.read_bytes())]

    assert said[0].replace(str(path), "…").replace(path.name, "…") == said[1].replace(IN_MEMORY, "…")


def outcome(source: Path | bytes) -> str:
    try:
        return str(sorted(lm.load(source)))
    except lm.errors.LoRAMergeError as error:
        return str(error)


@pytest.mark.parametrize("percent", range(100))
def test_a_file_cut_at_any_percent_is_refused(percent: int, tmp_path: Path) -> None:
    whole = lm.save(small(rank=2), tmp_path / "whole.safetensors", dialect="kohya").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) * percent // 100])

    with pytest.raises(lm.errors.FileError, match=re.escape("cut.safetensors")):
        lm.load(cut)


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("names")])
@pytest.mark.parametrize("dialect", ["other", "peft"])
def test_a_name_like_a_path_makes_no_file_elsewhere(name: str, dialect: str, tmp_path: Path) -> None:
    lora = lm.load(ATTACKS[name].make(tmp_path))
    (tmp_path / "new").mkdir()
    before = {path for path in tmp_path.rglob("*") if "new" not in path.parts}

    try:
        lm.save(lora, tmp_path / "new" / "x.safetensors", dialect=dialect)
    except lm.errors.DialectError:
        assert not list((tmp_path / "new").iterdir())

    assert {path for path in tmp_path.rglob("*") if "new" not in path.parts} == before


def test_a_link_does_not_lead_a_recipes_output_out_of_its_directory(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "out").symlink_to(tmp_path)
    path = tmp_path / "inside" / "recipe.toml"
    path.write_text('[[loras]]\npath = "x.safetensors"\n[output]\npath = "out/x.safetensors"\n')

    with pytest.raises(lm.errors.OptionError, match="not below"):
        Recipe.read(path)


@pytest.mark.parametrize("alpha", [-3.0, 0.0, 1e-30])
def test_an_alpha_of_any_sign_scales_the_update(alpha: float) -> None:
    keys = small(alpha=1.0, rank=2).state_dict("kohya")
    scaled = {key: value * alpha if key.endswith(".alpha") else value for key, value in keys.items()}

    for module, layer in lm.load(scaled).items():
        wanted = alpha * np.asarray(lm.load(keys)[module].delta())
        np.testing.assert_allclose(np.asarray(layer.delta()), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [np.complex64, np.object_, "S3"])
def test_a_state_dict_of_a_strange_dtype_is_refused_by_key(dtype: object) -> None:
    with pytest.raises(lm.errors.OptionError, match=r"'a\.lora_up\.weight' has the dtype"):
        lm.load({"a.lora_up.weight": np.ones((2, 1)).astype(dtype)})


def test_a_peft_directory_that_cannot_hold_every_component_is_refused(tmp_path: Path) -> None:
    keys = {f"{c}.foo.lora_{x}.weight": np.ones((2, 2), np.float32) for c in ("text_encoder_9", "unet") for x in "AB"}

    with pytest.raises(lm.errors.DialectError, match="text_encoder_9"):
        lm.save(lm.load(keys), tmp_path / "adapter", dialect="peft")


def test_a_header_that_no_reader_takes_is_not_written(tmp_path: Path) -> None:
    lora = lm.load(small().state_dict("kohya"), metadata={"a": "x" * 100_000_000})

    with pytest.raises(lm.errors.FileError, match="shorter metadata"):
        lm.save(lora, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_magnitude_without_a_direction_is_refused() -> None:
    keys = {"a.dora_scale": np.ones((2, 1), np.float32), "a.alpha": np.ones(())}

    with pytest.raises(lm.errors.LayerError, match="needs a direction"):
        lm.load(keys)
