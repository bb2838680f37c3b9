"""Recipes: read strictly, written back the same, and run again to the same bytes."""

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
from hypothesis import HealthCheck, given, settings, strategies as st

import loramerge as lm
from loramerge.errors import FileError, MergeError, OptionError
from loramerge.files.metadata import RECIPE
from loramerge.merging import Coefficients, toml
from loramerge.merging.recipe_text import Input, Output
from loramerge.testing import relative_error, weighted_sum
from small import MODULES, small
from still_open import on_linux, still_open

TWO = '[[loras]]\npath = "person.safetensors"\n[[loras]]\npath = "jersey.safetensors"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lm.save(small(seed=1, alpha=2.0, dtype="float16"), tmp_path / "person.safetensors", dialect="kohya")
    lm.save(small(seed=2, rank=6, dtype="float16"), tmp_path / "jersey.safetensors", dialect="diffusers-peft")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    return folder / "recipe.toml"


def refused(folder: Path, text: str) -> str:
    with pytest.raises(OptionError) as error:
        lm.Recipe.read(write(folder, text))
    return str(error.value)


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loramerge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def recipe_in(path: Path) -> dict[str, Any]:
    with lm.open(path) as lora:
        return json.loads(lora.metadata[RECIPE])  # type: ignore[no-any-return]


def again(merged: Path) -> Path:
    """The merged file made anew by the recipe in its header."""
    with lm.open(merged) as lora:
        text = lm.Recipe.of(lora).to_toml()
    (merged.parent / "again.toml").write_text(text, encoding="utf-8")
    return lm.Recipe.read(merged.parent / "again.toml").run(merged.parent / "again.safetensors")


def test_a_recipe_is_the_merge_it_says(folder: Path) -> None:
    text = (
        '[[loras]]\npath = "person.safetensors"\nweight = 0.7\n[[loras]]\npath = "jersey.safetensors"\n'
        'weight = { "*" = 0.5, text_encoder = 0 }\n[output]\npath = "both.safetensors"\nto = "comfyui"\n'
    )
    path = lm.Recipe.read(write(folder, text)).run()

    assert path == folder / "both.safetensors"
    both, parents = lm.load(path), [lm.load(folder / f"{n}.safetensors") for n in ("person", "jersey")]
    assert both.dialect == "comfyui"
    for module in both:
        weights = [0.7, 0.0 if module.startswith("text_encoder") else 0.5]
        assert relative_error(both[module].delta(), weighted_sum(parents, weights, module)) <= 1e-3


MERGES: dict[str, dict[str, Any]] = {
    "linear": {"weights": [0.7, 1 / 3]},
    "nothing said": {},
    "patterns": {"weights": [{"*": 0.1, "text_encoder": 0.0}, "lbw:" + ",".join(["0.3"] * 20)], "rank": 3},
    "ties": {"method": "ties", "density": 0.3, "rank": 4},
    "dare": {"method": "dare", "seed": 7, "space": "core"},
    "l2": {"weights": "l2", "scope": "component", "rank": "max"},
    "energy": {"weights": "energy"},
    "equal by module": {"weights": "equal", "scope": "module"},
    "sqrt": {"weights": "sqrt"},
    "max_error": {"weights": [1.0, 0.5], "max_error": "10%"},
    "max_size": {"max_size": 60_000},
    "exclude": {"exclude": ["text_encoder*"]},
    "torch": {"device": "cpu"},
}


@pytest.mark.parametrize("options", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize(("dialect", "dtype"), [("kohya", "float16"), ("diffusers-peft", None)])
def test_a_merged_file_can_be_made_again_to_the_byte(
    options: Mapping[str, Any], dialect: str, dtype: str | None, folder: Path
) -> None:
    planned = lm.plan([folder / "person.safetensors", folder / "jersey.safetensors"], **options)
    merged = lm.save(planned.lora(), folder / "both.safetensors", dialect=dialect, dtype=dtype)

    assert again(merged).read_bytes() == merged.read_bytes()


def test_a_merge_in_memory_can_be_made_again_to_the_byte(folder: Path) -> None:
    both = lm.merge([folder / "person.safetensors", folder / "jersey.safetensors"], weights=[0.7, 0.5], rank=3)
    merged = lm.save(both, folder / "both.safetensors", dialect="diffusers", dtype="bfloat16")

    assert again(merged).read_bytes() == merged.read_bytes()


def test_a_peft_directory_can_be_made_again_to_the_byte(folder: Path) -> None:
    person = lm.save(lm.load(folder / "person.safetensors"), folder / "person", dialect="peft")
    planned = lm.plan([person, folder / "jersey.safetensors"])
    merged = lm.save(planned.lora(), folder / "both", dialect="peft")
    recipe = lm.Recipe.of(lm.open(merged))

    made = dataclasses.replace(recipe, folder=str(folder)).run(folder / "again")

    files = sorted(p.relative_to(merged) for p in merged.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file())
    assert all((merged / f).read_bytes() == (made / f).read_bytes() for f in files)


def test_the_command_line_makes_a_file_again_to_the_byte(folder: Path) -> None:
    first = run(
        "merge", "person.safetensors", "jersey.safetensors", "-o", "both.safetensors", "-w", "0.7;text_encoder=0.2",
        "-w", "0.5", "--max-error", "5%", "--to", "kohya", "--dtype", "fp16", cwd=folder,
    )  # fmt: skip
    shown = run("inspect", "both.safetensors", "--recipe", cwd=folder)
    (folder / "again.toml").write_text(shown.stdout)

    second = run("merge", "again.toml", "-o", "again.safetensors", "-q", cwd=folder)

    assert (first.returncode, shown.returncode, second.returncode) == (0, 0, 0), first.stderr + second.stderr
    assert (folder / "again.safetensors").read_bytes() == (folder / "both.safetensors").read_bytes()


def test_a_changed_input_is_refused_until_it_is_allowed(folder: Path) -> None:
    merged = lm.save(lm.plan([folder / "person.safetensors", folder / "jersey.safetensors"]).lora(), folder / "both.safetensors")  # fmt: skip
    was = lm.open(folder / "jersey.safetensors").sha256
    lm.save(small(seed=3, rank=6, dtype="float16"), folder / "jersey.safetensors", dialect="diffusers-peft")
    now = lm.open(folder / "jersey.safetensors").sha256

    with pytest.raises(MergeError) as error:
        again(merged)

    assert all(word in str(error.value) for word in ("jersey.safetensors", was, now, "--allow-changed"))
    assert not (folder / "again.safetensors").exists()
    run("merge", "again.toml", "-o", "again.safetensors", "--allow-changed", cwd=folder)
    assert [i["sha256"] for i in recipe_in(folder / "again.safetensors")["inputs"]][1] == now


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_a_hash_is_that_of_the_file_that_safetensors_writes_of_the_tensors(
    dialect: str, dtype: str, tmp_path: Path
) -> None:
    path = lm.save(small(dtype=dtype), tmp_path / "a.safetensors", dialect=dialect)
    wanted = hashlib.sha256(safetensors.torch.save(safetensors.torch.load_file(path))).hexdigest()

    assert lm.open(path).sha256 == wanted
    assert lm.load(path).sha256 == wanted
    assert lm.open(safetensors.torch.load_file(path)).sha256 == wanted


def test_a_hash_survives_other_metadata_and_another_order_but_no_other_value(tmp_path: Path) -> None:
    path = lm.save(small(), tmp_path / "a.safetensors")
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, tmp_path / "b.safetensors", {"title": "other"})
    (tmp_path / "c.safetensors").write_bytes(_reordered(path.read_bytes()))
    key = next(key for key, tensor in tensors.items() if tensor.ndim)
    safetensors.numpy.save_file(
        {**tensors, key: np.nextafter(tensors[key], tensors[key] + 9)}, tmp_path / "d.safetensors"
    )
    safetensors.numpy.save_file({**tensors, "strange": np.zeros(1)}, tmp_path / "e.safetensors")

    a, b, c, d, e = (lm.open(tmp_path / f"{n}.safetensors").sha256 for n in "abcde")

    assert a == b == c
    assert len({a, d, e}) == 3


def _reordered(data: bytes) -> bytes:
    """A safetensors file with the tensors' bytes in the opposite order."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    out, entries = b"", {}
    for key in reversed([k for k in header if k != "__metadata__"]):
        begin, end = header[key]["data_offsets"]
        entries[key] = {**header[key], "data_offsets": [len(out), len(out) + end - begin]}
        out += body[begin:end]
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + out


def test_a_scale_beside_the_tensors_is_in_the_hash(tmp_path: Path) -> None:
    path = lm.save(small(modules=MODULES["sdxl"][:1], alpha=2.0), tmp_path / "peft", dialect="peft")
    before = lm.open(path).sha256
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3 * config["lora_alpha"]}))

    assert lm.open(path).sha256 != before


def test_the_header_has_everything_that_the_merge_depended_on(folder: Path) -> None:
    (folder / "below").mkdir()
    deep = (folder / "person.safetensors").rename(folder / "below" / "person.safetensors")
    loras = [deep, safetensors.torch.load_file(folder / "jersey.safetensors")]
    lora = lm.plan(loras, weights=[1, 0.25], method="dare", density=0.5, exclude="text_encoder").lora()
    merged = lm.save(lora, folder / "both.safetensors", dialect="kohya", dtype="bf16")

    found = recipe_in(merged)

    assert found["loramerge"] == lm.__version__
    assert (found["method"], found["rank"], found["exclude"]) == ("dare", "sum", ["text_encoder"])
    assert found["options"] == {"space": "delta", "density": 0.5, "consensus": "linear", "seed": 0}
    assert found["output"] == {"dialect": "kohya", "dtype": "bfloat16"}
    assert [entry["weight"] for entry in found["inputs"]] == [1.0, 0.25]
    assert [entry.get("source") for entry in found["inputs"]] == ["person.safetensors", None]
    assert [entry["sha256"] for entry in found["inputs"]] == [lm.open(source).sha256 for source in loras]
    assert str(folder) not in lm.open(merged).metadata[RECIPE]


def test_ranks_that_a_budget_chose_are_in_the_header(folder: Path) -> None:
    planned = lm.plan([folder / "person.safetensors", folder / "jersey.safetensors"], max_error=0.2)
    merged = lm.save(planned.lora(), folder / "both.safetensors")

    found = recipe_in(merged)

    assert found["budget"] == {"max_error": 0.2}
    assert found["ranks"] == {module: layer.rank for module, layer in lm.open(merged).layouts.items()}


def test_a_lora_from_memory_leaves_no_recipe_to_run(tmp_path: Path) -> None:
    merged = lm.save(lm.merge([small(seed=1), small(seed=2)]), tmp_path / "both.safetensors")

    with pytest.raises(MergeError, match="random-1 and random-2 came from memory"):
        lm.Recipe.of(lm.open(merged))


def test_a_part_of_a_file_is_not_the_file(folder: Path) -> None:
    part = lm.open(folder / "person.safetensors").select("unet")
    merged = lm.save(lm.merge([part, folder / "jersey.safetensors"]), folder / "both.safetensors")

    assert "source" not in recipe_in(merged)["inputs"][0]


@pytest.mark.parametrize("text", ["{}", "[]", "1", '{"inputs": [1]}', "not JSON", '{"inputs": [], "output": {}}'])
def test_a_strange_header_is_an_error_of_ours(text: str, tmp_path: Path) -> None:
    tensors = {k: v.numpy() for k, v in small().state_dict("kohya").items()}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", {RECIPE: text})

    with pytest.raises(lm.errors.LoRAMergeError, match="recipe"):
        lm.Recipe.of(lm.open(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("metod = 'ties'\n" + TWO, ["recipe.toml", "'metod'", "Did you mean 'method'?", "Known: method, options"]),
        (TWO + "weigth = 1\n", ["loras 2", "'weigth'", "Did you mean 'weight'?"]),
        (TWO + "[output]\nfile = 'a'\n", ["output", "'file'", "Known: path, to"]),
        ("method = 'tise'\n" + TWO, ["recipe.toml", "Did you mean 'ties'?"]),
        ("method = 3\n" + TWO, ["method: got 3, a whole number, wanted text"]),
        ("rank = 1.5\n" + TWO, ["rank: got 1.5, a number", '"sum"']),
        ("rank = true\n" + TWO, ["rank: got True, true or false"]),
        ("rank = 0\n" + TWO, ["recipe.toml: The rank 0"]),
        ("max_error = 2\n" + TWO, ["recipe.toml: max_error is a share"]),
        ("max_error = 0.1\nenergy = 0.9\n" + TWO, ["Give one budget"]),
        ("exclude = 'unet'\n" + TWO, ["exclude: got 'unet', text, wanted a list of texts"]),
        ("weights = 'l3'\n" + TWO, ["weights: Unknown weights 'l3'", "sqrt, l2,"]),
        ("weights = [1, 2]\n" + TWO, ["weights: got a list", "each LoRA"]),
        ("weights = 'l2'\n" + TWO + "weight = 1\n", ["not both"]),
        (TWO + "weight = 1\n", ["loras 1 has no weight"]),
        (TWO + "weight = { unet = 'x' }\n", ["loras 2", "weight: unet: got 'x', text, wanted a number"]),
        (TWO + "weight = 'x'\n", ["loras 2", "Can't read the weight 'x'"]),
        (TWO + "hub = 'a/b'\n", ["loras 2", "either a path or a name on the Hub"]),
        ("[[loras]]\nhub = 'nothing'\n", ["loras 1", "org/repo"]),
        ("[[loras]]\nhub = 'a/b@x'\nrevision = 'y'\n", ["loras 1", "named once"]),
        ("", ["no LoRA is named"]),
        ("loras = 3", ["loras: got 3", "[[loras]]"]),
        ("scope = 'whole'\n" + TWO, ["'whole'", "rule on norms only: l2, equal"]),
        ("architecture = 'sdxxl'\n" + TWO, ["Did you mean 'sdxl'?"]),
        ("method = 'ties'\n" + TWO + "[options]\ndensity = 2\n", ["density", "got 2"]),
        (TWO + "[options]\ndensity = 0.2\n", ["has no option 'density'"]),
        (TWO + "[output]\nto = 'koyha'\n", ["Did you mean 'kohya'?"]),
        (TWO + "[output]\ndtype = 'int4'\n", ["Unknown dtype 'int4'"]),
        (TWO + "[ranks]\nunet = 'a'\n", ["ranks: unet: got 'a', text, wanted a whole number"]),
    ],
)
def test_a_wrong_recipe_says_where_and_what(text: str, words: list[str], tmp_path: Path) -> None:
    message = refused(tmp_path, text)

    assert all(word in message for word in words), message


def test_a_recipe_is_the_same_as_text_and_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(TWO)

    assert lm.Recipe.parse(TWO) == lm.Recipe.read(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[loras", "mine is not TOML"),
        ("#" * 1_000_001, "mine is too long: got 1000001"),
        ("rank = 1", "mine: no LoRA"),
    ],
    ids=["broken", "long", "empty"],
)
def test_a_wrong_text_is_named(text: str, words: str) -> None:
    with pytest.raises((FileError, OptionError)) as told:
        lm.Recipe.parse(text, "mine")

    assert words in str(told.value)


def test_a_scope_stays_with_another_rule_on_norms_and_goes_with_other_weights() -> None:
    recipe = lm.Recipe(loras=(), weights="l2", scope="component")

    assert recipe.override(weights="equal").scope == "component"
    assert recipe.override(weights="sqrt").scope is None
    assert recipe.override(weights=(0.5,)).scope is None


@pytest.mark.parametrize("path", ["../both.safetensors", "/tmp/both.safetensors", "~/both.safetensors", "a/../../b.safetensors", "."])  # fmt: skip
def test_a_recipe_writes_below_its_own_directory_only(path: str, tmp_path: Path) -> None:
    assert "below the recipe's directory" in refused(tmp_path, TWO + f"[output]\npath = '{path}'\n")


def test_a_link_out_of_the_directory_is_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)

    assert "below the recipe's directory" in refused(tmp_path / "in", TWO + "[output]\npath = 'link/b.safetensors'\n")


def test_a_file_that_is_not_toml_is_a_readable_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"recipe.toml is not TOML: .*line 2"):
        lm.Recipe.read(write(tmp_path, "\nrank = \n"))
    with pytest.raises(FileError, match="No such file"):
        lm.Recipe.read(tmp_path / "missing.toml")


def test_ranks_must_fit_the_merge(folder: Path) -> None:
    recipe = lm.Recipe.read(write(folder, TWO))
    ranks = dict.fromkeys(MODULES["sdxl"], 2)

    assert {step.rank for step in recipe.override(ranks=ranks).plan().steps.values()} == {2}
    for wrong, message in (
        ({"a": 1}, "a has a rank but is not merged"),
        ({MODULES["sdxl"][0]: 99}, "got 99, wanted a number from 1 to 10"),
    ):
        with pytest.raises(OptionError, match=message):
            recipe.override(ranks=ranks | wrong).plan()
    with pytest.raises(OptionError, match="has no rank"):
        recipe.override(ranks={}).plan()


def test_the_command_line_overrides_a_recipe(folder: Path) -> None:
    write(folder, "method = 'dare'\nrank = 3\n" + TWO + "[options]\ndensity = 0.5\nseed = 3\n[output]\npath = 'b.safetensors'\n")  # fmt: skip

    result = run("merge", "recipe.toml", "--method", "ties", "-w", "1", "-w", "0.5", "--to", "kohya", cwd=folder)

    assert result.returncode == 0, result.stderr
    assert "option seed is left out: ties" in result.stdout
    found = recipe_in(folder / "b.safetensors")
    assert (found["method"], found["rank"], found["options"]) == ("ties", 3, {"space": "delta", "density": 0.5})
    assert [entry["weight"] for entry in found["inputs"]] == [1.0, 0.5]


def test_a_dry_run_of_a_recipe_writes_nothing(folder: Path) -> None:
    write(folder, TWO)
    before = sorted(folder.iterdir())

    result = run("merge", "recipe.toml", "--dry-run", cwd=folder)

    assert (result.returncode, sorted(folder.iterdir())) == (0, before)
    assert "linear: 4 modules of sdxl" in result.stdout


@pytest.mark.parametrize("budget", [{"max_size": "30kB"}, {"max_error": 0.5}])
def test_a_budget_is_spent_on_what_is_written_when_the_rest_is_left_out(budget: dict[str, Any], tmp_path: Path) -> None:
    lora = small(rank=16, dtype="float32")
    biased = dataclasses.replace(lora[MODULES["sdxl"][1]], diff_b=np.ones(320, np.float32))
    mixed = dataclasses.replace(lora, layouts={**lora.layouts, MODULES["sdxl"][1]: biased})
    lm.save(mixed, tmp_path / "in.safetensors", dialect="kohya")
    output = Output(to="diffusers", allow_lossy=True)

    recipe = lm.Recipe(loras=(Input(path=str(tmp_path / "in.safetensors")),), output=output, **budget)
    made = recipe.run(tmp_path / "out.safetensors")

    assert set(lm.load(made)) == {*MODULES["sdxl"]} - {MODULES["sdxl"][1]}
    assert "max_size" not in budget or 20_000 < made.stat().st_size <= 30_000


def test_a_recipe_comes_alone_and_with_an_output(folder: Path) -> None:
    write(folder, TWO)

    assert "is a recipe" in run("merge", "recipe.toml", "person.safetensors", "-o", "b.safetensors", cwd=folder).stderr
    assert "Give --output FILE" in run("merge", "recipe.toml", cwd=folder).stderr


def test_ranks_go_when_something_that_they_depend_on_changes() -> None:
    recipe = lm.Recipe(loras=(Input(path="a"),), max_error=0.1, ranks={"m": 3})

    assert recipe.override(weights=(0.5,)).ranks is None
    assert recipe.override().ranks == {"m": 3}


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9)
WEIGHTS = NUMBERS | st.dictionaries(NAMES, NUMBERS, max_size=3) | st.just("lbw:1,0,0.5")
INPUTS = st.builds(
    Input, path=NAMES, sha256=st.none() | NAMES, architecture=st.none() | NAMES, dialect=st.none() | NAMES
) | st.builds(
    Input, hub=st.just("some/repo"), revision=st.none() | st.just("main"), filename=st.none() | st.just("a.b")
)


@st.composite
def recipes(draw: st.DrawFn) -> lm.Recipe:
    loras = draw(st.lists(INPUTS, min_size=1, max_size=3))
    size = len(loras)
    weights = st.lists(WEIGHTS, min_size=size, max_size=size).map(tuple) | st.sampled_from(
        [None, "l2", "energy-sum", "uniform"]
    )
    chosen: dict[str, Any] = draw(
        st.sampled_from([{}, {"max_error": "1%"}, {"max_error": 0.01}, {"energy": 0.9}, {"max_size": 150_000}])
    )
    given_weights = draw(weights)
    return lm.Recipe(
        loras=tuple(loras),
        weights=given_weights,
        weights_sha256=draw(st.none() | st.just("0" * 64)) if isinstance(given_weights, str) else None,
        scope=draw(st.sampled_from([None, "module", "whole"])) if given_weights in ("l2", "energy-sum") else None,
        method="dare",
        options=draw(st.fixed_dictionaries({}, optional={"density": st.floats(0.1, 1), "seed": st.integers(0, 2**40)})),
        rank=draw(st.integers(1, 99) | st.sampled_from(["sum", "max"])),
        exclude=tuple(draw(st.lists(NAMES, max_size=2))),
        architecture=draw(st.sampled_from([None, "sdxl"])),
        device=draw(st.none() | NAMES),
        base=draw(st.none() | NAMES),
        base_sha256=draw(st.none() | st.just("0" * 64)),
        ranks=draw(st.none() | st.dictionaries(NAMES, st.integers(1, 9), min_size=1, max_size=3)),
        output=Output(
            path=draw(st.sampled_from([None, "a b.safetensors"])),
            to=draw(st.sampled_from([None, "kohya", "peft"])),
            dtype=draw(st.sampled_from([None, "fp16"])),
            allow_lossy=draw(st.booleans()),
        ),
        **chosen,
    )


@given(recipe=recipes())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_a_recipe_written_and_read_is_the_same(recipe: lm.Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("r"), recipe.to_toml())

    found = lm.Recipe.read(path)

    assert found == recipe
    assert found.to_toml() == recipe.to_toml()


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | NUMBERS | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
)


@given(value=VALUES, name=st.text(st.characters(codec="utf-8")))
@settings(deadline=None)
def test_toml_is_read_back(value: object, name: str) -> None:
    assert tomllib.loads("\n".join(toml.lines({name: value}))) == {name: value}


def test_a_repository_is_named_with_the_commit_that_was_fetched() -> None:
    from loramerge.files import hub

    cached = Path("/cache/models--some--repo/snapshots/0123abcd/sub/a.safetensors")
    reference = hub.parse("some/repo/sub/a.safetensors@main")
    assert reference is not None

    name = hub.pinned(reference, cached)

    assert name == "hf://some/repo/sub/a.safetensors@0123abcd"
    assert hub.parse(name) == hub.Reference("some/repo", "sub/a.safetensors", "0123abcd")


@pytest.mark.parametrize(
    "text",
    [
        'hub = "some/repo/a.safetensors@main"',
        'hub = "hf://some/repo/a.safetensors"\nrevision = "main"',
        'hub = "some/repo"\nfilename = "a.safetensors"\nrevision = "main"',
    ],
)
def test_a_repository_is_named_in_one_or_in_parts(text: str, tmp_path: Path) -> None:
    (lora,) = lm.Recipe.read(write(tmp_path, f"[[loras]]\n{text}\n")).loras

    assert lora == Input(hub="some/repo", filename="a.safetensors", revision="main")
    assert lora.source(str(tmp_path)) == "hf://some/repo/a.safetensors@main"


def on_base(folder: Path) -> tuple[Path, Path]:
    """A merge of a DoRA, and its base."""
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    base = folder / "base.safetensors"
    safetensors.numpy.save_file({key: np.random.default_rng(0).standard_normal((640, 640), dtype=np.float32)}, base)
    lm.save(small(modules=MODULES["sdxl"][:1], kind="dora", seed=1), folder / "dora.safetensors", dialect="kohya")
    text = 'base = "base.safetensors"\nrank = 4\n[[loras]]\npath = "dora.safetensors"\n'
    return lm.Recipe.read(write(folder, text)).run(folder / "merged.safetensors"), base


def test_a_merge_on_a_base_knows_the_base_by_its_bytes(tmp_path: Path) -> None:
    merged, base = on_base(tmp_path)

    assert recipe_in(merged)["base_sha256"] == hashlib.sha256(base.read_bytes()).hexdigest()
    assert again(merged).read_bytes() == merged.read_bytes()


def test_another_base_of_the_same_name_is_refused_until_it_is_allowed(tmp_path: Path) -> None:
    merged, base = on_base(tmp_path)
    with lm.open(merged) as lora:
        recipe = dataclasses.replace(lm.Recipe.of(lora), folder=str(tmp_path))
    safetensors.numpy.save_file({key: 2 * value for key, value in safetensors.numpy.load_file(base).items()}, base)

    with pytest.raises(MergeError, match=r"base\.safetensors has changed: its sha256 .*--allow-changed"):
        recipe.plan()
    assert recipe.plan(allow_changed=True)


def learned(folder: Path, value: float) -> None:
    """Coefficients of one value for the LoRAs of the folder."""
    loras = [lm.load(folder / f"{name}.safetensors") for name in ("person", "jersey")]
    columns = {m: np.full((2, math.prod(loras[0].layout(m).shape[1:])), value, np.float32) for m in loras[0]}
    Coefficients.of(columns, loras, [1.0, 1.0]).save(folder / "learned.safetensors")


def test_a_merge_by_learned_weights_knows_their_numbers(folder: Path) -> None:
    learned(folder, 0.5)
    recipe = lm.Recipe.read(write(folder, f'weights = "learned.safetensors"\n{TWO}'))
    merged = recipe.run(folder / "merged.safetensors")
    with lm.open(merged) as lora:
        made = dataclasses.replace(lm.Recipe.of(lora), folder=str(folder))
    assert recipe_in(merged)["weights_sha256"] == made.weights_sha256 == recipe.plan().weights.sha256
    assert again(merged).read_bytes() == merged.read_bytes()

    learned(folder, 0.25)

    with pytest.raises(MergeError, match=r"in learned\.safetensors have changed: their sha256 is .*--allow-changed"):
        made.plan()
    assert made.plan(allow_changed=True)
    assert made.override(weights="sum").plan()


def test_a_base_that_the_result_does_not_depend_on_is_not_hashed(folder: Path) -> None:
    on_base(folder)
    lora = folder / "person.safetensors"

    merged = lm.save(lm.merging.plan([lora], base=folder / "base.safetensors").lora(), folder / "merged.safetensors")

    assert "base_sha256" not in recipe_in(merged)


@pytest.mark.parametrize(
    ("entry", "what"),
    [('base = "other.safetensors"', "the base model"), ('weights = "other.safetensors"', "the file of the weights")],
)
def test_a_recipe_does_not_write_over_what_it_reads(entry: str, what: str, folder: Path) -> None:
    text = f'{entry}\n[[loras]]\npath = "person.safetensors"\n[output]\npath = "other.safetensors"\n'

    with pytest.raises(OptionError, match=f"other.safetensors is {what}. Way out"):
        lm.Recipe.read(write(folder, text)).target()


@pytest.mark.parametrize(
    "part",
    [
        lambda whole: lm.open(whole).exclude("text_encoder*"),
        lambda whole: lm.load(whole).select("unet*"),
        lambda whole: lm.plan([whole], weights=[1.0]).lora().exclude("text_encoder*"),
    ],
    ids=["exclude", "select", "plan"],
)
def test_a_part_of_a_merge_names_its_parents_and_has_no_recipe(part: Any, folder: Path) -> None:
    whole = lm.Recipe.read(write(folder, TWO)).run(folder / "whole.safetensors")

    saved = lm.save(part(whole), folder / "part.safetensors", dialect="kohya")

    assert [entry["name"] for entry in recipe_in(saved)["inputs"]] in (
        ["person.safetensors", "jersey.safetensors"],
        ["whole.safetensors"],
    )
    with lm.open(saved) as lora, pytest.raises(MergeError, match=r"part\.safetensors has no recipe .* changed since"):
        lm.Recipe.of(lora)


def test_a_merge_without_some_modules_has_its_recipe_and_those_of_its_parents(folder: Path) -> None:
    whole = lm.Recipe.read(write(folder, TWO)).run(folder / "whole.safetensors")

    merged = lm.save(lm.plan([whole], weights=[0.5], exclude="text_encoder*").lora(), folder / "merged.safetensors")

    (entry,) = recipe_in(merged)["inputs"]
    assert json.loads(entry["metadata"][RECIPE]) == recipe_in(whole)
    assert again(merged).read_bytes() == merged.read_bytes()


def test_a_text_in_place_of_a_recipe_is_kept(folder: Path) -> None:
    tensors = safetensors.numpy.load_file(folder / "person.safetensors")
    safetensors.numpy.save_file(tensors, folder / "own.safetensors", {RECIPE: "made by hand"})

    saved = lm.save(lm.open(folder / "own.safetensors").exclude("text_encoder*"), folder / "part.safetensors")

    assert lm.files.read_metadata(saved)[RECIPE] == "made by hand"


@pytest.mark.parametrize(
    ("read", "written", "to"),
    [
        ("p", "p", None),
        ("p", "p.safetensors", None),
        ("p", "p", "peft"),
        ("p", "p.safetensors", "peft"),
        ("p", "p/adapter_model.safetensors", "kohya"),
        ("p/adapter_model.safetensors", "p", "peft"),
        ("p/text_encoder", "p", "peft"),
        ("alone", "alone/x.safetensors", "kohya"),
    ],
)
def test_an_input_in_a_directory_is_not_written_over(read: str, written: str, to: str | None, tmp_path: Path) -> None:
    lm.save(small(seed=1), tmp_path / "p", dialect="peft")
    (tmp_path / "alone").mkdir()
    lm.save(small(seed=2), tmp_path / "alone" / "x.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    recipe = lm.Recipe(loras=(Input(path=str(tmp_path / read)),), output=Output(to=to))

    with pytest.raises(OptionError, match="is one of the LoRAs that are merged"):
        recipe.run(tmp_path / written)

    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


def test_a_file_may_stand_beside_the_directory_that_is_read(tmp_path: Path) -> None:
    lm.save(small(seed=1), tmp_path / "p", dialect="peft")
    recipe = lm.Recipe(loras=(Input(path=str(tmp_path / "p")),), output=Output(to="kohya"))

    assert recipe.run(tmp_path / "p.safetensors") == tmp_path / "p.safetensors"


@on_linux
def test_a_recipe_closes_what_it_opened(folder: Path) -> None:
    text = "[[loras]]\npath = 'person.safetensors'\n[[loras]]\npath = '{}'\n"
    write(folder, text.format("jersey.safetensors"))

    lm.Recipe.read(folder / "recipe.toml").run(folder / "out.safetensors")
    lm.sweep(folder / "recipe.toml", {"rank": [2]}, folder / "swept")
    with pytest.raises(FileError):
        lm.Recipe.read(write(folder, text.format("missing.safetensors"))).open()

    assert still_open(folder) == []
