"""JSON Schemas of recipes, which agree with the reader, and of what ``--json`` prints; merges saved as recipes."""

import json
import re
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

import loramerge as lm
from loramerge.cli.app import VERBS, app, real
from loramerge.cli.outputs import OUTPUT_SCHEMAS, OUTPUTS, output_schemas
from loramerge.merging import RECIPE_SCHEMA, recipe_schema
from small import small

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/how-to").glob("*.md"))
SHOWN = [
    text
    for page in PAGES
    for text in re.findall(
        r'^```toml title="[\w-]*recipe\.toml"\n(.*?)^```', page.read_text(), re.MULTILINE | re.DOTALL
    )
]
ONE = "[[loras]]\npath = 'a.safetensors'\n"


def is_valid(data: Any) -> bool:
    return jsonschema.Draft202012Validator(recipe_schema()).is_valid(data)


def is_read(text: str, folder: Path) -> bool:
    path = folder / "recipe.toml"
    path.write_text(text)
    try:
        lm.Recipe.read(path)
    except lm.errors.OptionError:
        return False
    return True


def test_the_packages_schema_is_that_of_the_reader() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())

    assert json.loads(RECIPE_SCHEMA.read_text()) == recipe_schema()  # or else: python tools/write_schemas.py


def test_the_packages_schemas_of_outputs_are_those_of_every_command_with_json() -> None:
    jsonschema.Draft202012Validator.check_schema(output_schemas())

    assert json.loads(OUTPUT_SCHEMAS.read_text()) == output_schemas()
    assert set(OUTPUTS) == {verb for verb in VERBS if any("--json" in p.opts for p in real(verb).params)}


def printed(verb: str, *words: str | Path) -> Any:
    """The output of a command, which is valid."""
    result = CliRunner().invoke(app, [verb, *map(str, words), "--json"])
    data = json.loads(result.output)
    jsonschema.validate(data, OUTPUTS[verb])
    return data


def test_what_is_printed_is_valid(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramerge.cli.doctor.self_test", lambda: float("nan"))

    found = printed("inspect", files[0], "--norms")
    found["modules"][next(iter(found["modules"]))]["nrom"] = 1
    printed("compare", *files)
    for verb in ("dialects", "methods", "doctor"):
        printed(verb)

    with pytest.raises(jsonschema.ValidationError, match="nrom"):
        jsonschema.validate(found, OUTPUTS["inspect"])


def test_what_compositions_print_is_valid() -> None:
    pytest.importorskip("diffusers")

    printed("compositions")


def test_recipes_of_the_guides_are_valid(tmp_path: Path) -> None:
    assert len(SHOWN) > 1
    for text in SHOWN:
        assert is_valid(tomllib.loads(text))
        assert is_read(text, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        f"methud = 'ties'\n{ONE}",
        f"rank = true\n{ONE}",
        f"exclude = 'unet'\n{ONE}",
        f"exclude = [1]\n{ONE}",
        f"{ONE}wieght = 1\n",
        f"{ONE}weight = {{ unet = 'x' }}\n",
        f"{ONE}revision = 'main'\n",
        "[[loras]]\nweight = 1\n",
        f"{ONE}hub = 'a/b'\n",
        f"{ONE}[output]\npaht = 'b.safetensors'\n",
        f"{ONE}[output]\nallow_lossy = 'yes'\n",
        f"{ONE}[ranks]\nunet = 'x'\n",
        f"method = 'ties'\n{ONE}[options]\ndensitty = 0.3\n",
        f"{ONE}[options]\ndensity = 0.3\n",
        "method = 'ties'\n",
        "loras = []\n",
    ],
)
def test_what_is_wrong_in_a_recipe_is_refused_by_the_schema_and_by_the_reader(text: str, tmp_path: Path) -> None:
    assert not is_valid(tomllib.loads(text))
    assert not is_read(text, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        f"method = 'TIES'\nrank = 8\n{ONE}weight = {{ '*' = 0.5, text_encoder = 0 }}\n[options]\ndensity = 0.3\n",
        f"weights = 'l2'\nscope = 'module'\nmax_error = '1%'\n{ONE}[[loras]]\nhub = 'a/b'\nrevision = 'main'\n",
        f"method = 'package.module:name'\n{ONE}[options]\nanything = 1\n[output]\nto = 'Kohya'\ndtype = 'fp16'\n",
    ],
)
def test_what_the_reader_takes_is_valid(text: str, tmp_path: Path) -> None:
    assert is_read(text, tmp_path)
    assert is_valid(tomllib.loads(text))


COUPLE = re.search(
    r'^```toml title="couple.toml"\n(.*?)^```', (ROOT / "docs/how-to/compose.md").read_text(), re.M | re.S
)


@pytest.mark.parametrize(
    ("old", "new", "valid"),
    [
        ("", "", True),
        ('"someone/barca-lora-sdxl"', '"a/b"\nrevision = "main"', True),
        ('"regions"', '"Regions"', True),
        ("hard = true", "haard = true", False),
        ("weight = 0.8", "weight = true", False),
        ("weight = 0.8", "weight = { unet = 1 }", False),
        ("0.5, 1]", "0.5]", False),
        ("[0.5, 0]", "[0.5]", False),
        ("noun =", "nuon =", False),
        ("[compose]", "[composed]", False),
    ],
)
def test_the_schema_of_compositions_agrees_with_their_reader(old: str, new: str, valid: bool, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from loramerge.diffusion import read_composed
    from loramerge.diffusion.composing.schemas import COMPOSITION_SCHEMA, composition_schema

    assert COUPLE
    assert json.loads(COMPOSITION_SCHEMA.read_text()) == composition_schema()  # or else: python tools/write_schemas.py
    text = COUPLE[1].replace(old, new, 1)
    lm.save(small(seed=1), tmp_path / "person.safetensors", dialect="kohya")
    read = re.sub(r"hub = .*\n(revision = .*\n)?", 'path = "person.safetensors"\n', text)
    (tmp_path / "couple.toml").write_text(read)

    assert jsonschema.Draft202012Validator(composition_schema()).is_valid(tomllib.loads(text)) == valid
    with nullcontext() if valid else pytest.raises(lm.errors.OptionError):
        read_composed(tmp_path / "couple.toml")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "in").mkdir()
    one, two = (lm.save(small(seed=i, rank=2), tmp_path / "in" / f"{i}.safetensors", dialect="kohya") for i in (1, 2))
    return one, two


def merge(*words: str | Path) -> str:
    result = CliRunner().invoke(app, ["merge", *map(str, words)])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def test_a_merge_that_was_typed_is_saved_as_a_recipe_that_gives_the_same_bytes(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "in")
    recipe = tmp_path / "recipes" / "both.toml"
    recipe.parent.mkdir()
    typed = ["1.safetensors", files[1], "-w", "0.7", "-w", "0.5;text_encoder=0", "-m", "ties", "-O", "density=0.3"]

    output = merge(*typed, "-r", "3", "-o", tmp_path / "recipes" / "both.safetensors", "--save-recipe", recipe)

    assert f"→ {recipe}" in output
    found = lm.Recipe.read(recipe)
    assert [entry.path for entry in found.loras] == ["../in/1.safetensors", "../in/2.safetensors"]
    assert [entry.sha256 for entry in found.loras] == [lm.load(file).sha256 for file in files]
    assert found.output.path == "both.safetensors"
    assert is_valid(tomllib.loads(recipe.read_text()))
    monkeypatch.chdir("/")
    again = found.run(tmp_path / "again.safetensors")
    assert again.read_bytes() == (tmp_path / "recipes" / "both.safetensors").read_bytes()


def test_a_saved_recipe_refuses_other_files_and_leaves_out_an_output_elsewhere(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "in" / "both.toml"
    merge(*files, "-o", tmp_path / "both.safetensors", "--save-recipe", recipe, "-q")

    assert lm.Recipe.read(recipe).output.path is None
    lm.save(small(seed=9), files[0], dialect="kohya")
    with pytest.raises(lm.errors.MergeError, match="has changed"):
        lm.Recipe.read(recipe).run(tmp_path / "x.safetensors")


def test_a_recipe_is_saved_as_toml_only(files: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["merge", *map(str, files), "-o", str(tmp_path / "x.safetensors"), "--save-recipe", str(files[0])]

    result = CliRunner().invoke(app, words)

    assert "wanted a name that ends in .toml" in str(result.exception)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names elsewhere are text")
def test_a_recipe_that_could_not_be_read_again_is_not_saved(files: tuple[Path, Path], tmp_path: Path) -> None:
    files[0].rename(tmp_path / "in" / "no-character-\udcff.safetensors")
    read = [str(path) for path in sorted((tmp_path / "in").iterdir())]
    words = ["merge", *read, "-o", str(tmp_path / "x.safetensors"), "--save-recipe", str(tmp_path / "x.toml")]

    result = CliRunner().invoke(app, words)

    assert "TOML can't hold" in str(result.exception)
    assert not list(tmp_path.glob("x.*"))
