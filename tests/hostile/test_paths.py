"""Text from users and files is a path once: checked in the spelling that is opened, and what is shared leads nowhere else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loramerge as lm
from loramerge.cli.sweep import read_grid
from loramerge.files.storage.paths import located, path_of
from loramerge.merging.grid import points
from loramerge.merging.recipe import Recipe
from small import MODULES, small

UNET = MODULES["sdxl"][:2]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BYTES = os.fsdecode(b"a\xff.safetensors")
RECIPE = '[[loras]]\npath = "a.safetensors"\nweight = 1.0\n'


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with two LoRAs and a directory called ``~``; the home directory is another one."""
    for name in ("home", "here", "here/~"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    monkeypatch.chdir(tmp_path / "here")
    for i, name in enumerate("ab"):
        lm.save(small(modules=UNET, seed=i), f"{name}.safetensors", dialect="kohya")
    return tmp_path / "here"


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    found = subprocess.run([sys.executable, "-m", "loramerge", *words], capture_output=True, text=True, check=False)
    assert "Traceback" not in found.stderr
    return found


def made(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(
    ("text", "place"),
    [("~/x", "home/x"), ("./~/x", "here/~/x"), (".//~/x", "here/~/x"), ("~nobody_here/x", "here/~nobody_here/x")],
)
def test_a_tilde_is_read_in_the_text_as_it_was_typed_and_once(text: str, place: str, here: Path) -> None:
    found = path_of(text)

    assert os.path.abspath(found) == str(here.parent / place)
    assert path_of(found) == path_of(str(found)) == path_of(found.name, found.parent) == found


@pytest.mark.parametrize(
    "text", ["x", "./x", "a//b", "a/./b", "a/../b", "x/", "/x/", ".", "..", ".x/y", "a b", "./~/x", "~/x"]
)
@pytest.mark.parametrize("folder", ["", "f", "f/"])
def test_a_path_as_text_is_the_path(text: str, folder: str, here: Path) -> None:
    assert located(text, folder) == str(path_of(text, folder))
    assert Path(located(text)) == (Path(os.path.expanduser(text)) if "./~" not in text else here / "~/x")


@pytest.mark.parametrize("text", ["", "a\0b", "\ud800", "x" * 256, "~\0"])
def test_what_can_be_no_path_is_refused(text: str) -> None:
    with pytest.raises(lm.errors.FileError, match="path"):
        path_of(text)


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")

    for use in (lm.open, lm.checkpoints.open_checkpoint, Recipe.read, lambda path: lm.save(small(), path / "x")):
        with pytest.raises(lm.errors.FileError, match="symbolic links"):
            use(tmp_path / "loop")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("merge", "a.safetensors", "b.safetensors", "-o", "./~/x.safetensors"), "x.safetensors"),
        (("merge", "./~/recipe.toml"), "x.safetensors"),
        (("convert", "./~/in.safetensors", "-o", "./~/x.safetensors", "--to", "comfyui"), "x.safetensors"),
        (("resize", "./~/in.safetensors", "-o", "./~/x.safetensors", "-r", "1"), "x.safetensors"),
        (("compare", "a.safetensors", "b.safetensors", "--heatmap", "./~/x.png"), "x.png"),
        (("sweep", "./~/recipe.toml", "--set", "rank=1", "-o", "./~/out"), "out/rank=1.safetensors"),
        (("bake", "./~/in.safetensors", "--base", "./~/base", "-o", "./~/x"), f"x/{WEIGHTS}"),
    ],
)
def test_a_directory_called_tilde_is_one(words: tuple[str, ...], name: str, here: Path) -> None:
    for copy in ("in", "a"):
        shutil.copy("a.safetensors", f"./~/{copy}.safetensors")
    (here / "~" / "recipe.toml").write_text(f'{RECIPE}[output]\npath = "x.safetensors"\n')
    base(here / "~" / "base")

    found = run(*words)

    assert found.returncode == 0, found.stderr
    assert (here / "~" / name).exists()
    assert not made(here.parent / "home")


def base(folder: Path) -> Path:
    """A model of two modules, in diffusers' layout."""
    shapes = {module: layer.shape for module, layer in small(modules=UNET).layouts.items()}
    (folder / "unet").mkdir(parents=True)
    weights = {f"{module.removeprefix('unet.')}.weight": np.ones(shape, np.float32) for module, shape in shapes.items()}
    save_file(weights, folder / WEIGHTS)
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.mark.parametrize("words", [("merge", "a.safetensors", "b.safetensors", "-o", "~nobody_here.safetensors")])
def test_a_tilde_that_names_no_user_is_a_name(words: tuple[str, ...], here: Path) -> None:
    assert run(*words).returncode == 0
    assert (here / "~nobody_here.safetensors").exists()


@pytest.mark.parametrize("path", ["./~/evil.safetensors", ".//~/x", "./~root/x.safetensors", "~", "~nobody_here/x"])
@pytest.mark.parametrize("to", ["", 'to = "peft"'])
def test_a_recipe_writes_no_output_at_home(path: str, to: str, here: Path) -> None:
    before = made(here)
    Path("recipe.toml").write_text(f'{RECIPE}[output]\npath = "{path}"\n{to}\n')

    found = run("merge", "recipe.toml")

    assert found.returncode == 1
    assert "is not below the recipe's directory" in found.stderr
    assert not made(here.parent / "home")
    assert made(here) == before | {"recipe.toml"}


@pytest.mark.parametrize("link", ["out", "out/text_encoder"])
@pytest.mark.parametrize("path", ["out", "out.safetensors"])
def test_no_link_in_a_shared_folder_leads_an_adapter_out_of_it(link: str, path: str, here: Path) -> None:
    (here / link).parent.mkdir(exist_ok=True)
    (here / link).symlink_to(here.parent / "home")
    Path("recipe.toml").write_text(f'{RECIPE}[output]\npath = "{path}"\nto = "peft"\n')

    with pytest.raises(lm.errors.OptionError, match="not below"):
        Recipe.read("recipe.toml").run()
    assert not made(here.parent / "home")


def test_a_path_of_a_recipe_is_never_fetched_from_the_hub(here: Path) -> None:
    Path("recipe.toml").write_text('[[loras]]\npath = "someone/lora"\n')

    with pytest.raises(lm.errors.FileError, match="No such file or directory: someone/lora"):
        Recipe.read("recipe.toml").open()


def test_an_input_is_not_overwritten_in_another_spelling(here: Path) -> None:
    shutil.copy("a.safetensors", here.parent / "home" / "a.safetensors")
    recipe = Recipe(loras=(lm.merging.Input(path="~/a.safetensors"),))

    with pytest.raises(lm.errors.OptionError, match="one of the LoRAs that are merged"):
        recipe.run(here.parent / "home" / "a.safetensors")


@pytest.mark.parametrize(
    ("place", "leads_to"),
    [
        ("unet/assets", "../../private"),
        ("assets", "unet"),
        ("unet/loop", ".."),
        ("config.json", "../private/id_rsa"),
        ("unet/config.json", "/etc/hostname"),
        ("gone", "nowhere"),
    ],
)
def test_no_link_leads_a_bake_out_of_the_model(place: str, leads_to: str, tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id_rsa").write_text("secret")
    (model / place).symlink_to(leads_to)

    with pytest.raises(lm.errors.FileError, match=f"{place}: it is a link to"):
        lm.bake([small(modules=UNET)], model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pipe_in_a_model_is_refused(tmp_path: Path) -> None:
    os.mkfifo(base(tmp_path / "base") / "pipe")

    with pytest.raises(lm.errors.FileError, match="a pipe or a device"):
        lm.bake([small(modules=UNET)], tmp_path / "base", tmp_path / "out")


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = base(tmp_path / "models--org--name" / "snapshots" / ("0" * 40))
    (tmp_path / "models--org--name" / "blobs").mkdir()
    for i, file in enumerate(file for file in snapshot.rglob("*") if file.is_file()):
        blob = tmp_path / "models--org--name" / "blobs" / str(i)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    (snapshot / "same.json").symlink_to("model_index.json")

    lm.bake([small(modules=UNET)], snapshot, tmp_path / "out")

    assert made(tmp_path / "out") == made(snapshot)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_name_that_is_not_utf8_is_merged_resized_drawn_and_baked(here: Path) -> None:
    shutil.copy("a.safetensors", BYTES)
    model = base(here / os.fsdecode(b"base\xff"))

    for words in (
        ("merge", BYTES, "b.safetensors", "-o", os.fsdecode(b"m\xff.safetensors")),
        ("resize", BYTES, "-o", "r.safetensors", "-r", "1"),
        ("compare", BYTES, "b.safetensors", "--heatmap", "x.png"),
        ("bake", BYTES, "--base", str(model), "-o", "out"),
        ("inspect", os.fsdecode(b"m\xff.safetensors"), "--recipe"),
        ("sweep", "recipe.toml", "--set", "rank=1", "-o", os.fsdecode(b"out\xff")),
    ):
        Path("recipe.toml").write_text(RECIPE)
        assert run(*words).returncode == 0

    assert lm.open(BYTES).name == r"a\xff.safetensors"
    assert r"a\\xff.safetensors" in lm.open(os.fsdecode(b"m\xff.safetensors")).metadata["loramerge"]
    assert load_file(f"out/{WEIGHTS}")


@pytest.mark.parametrize("length", [240, 241, 242, 254, 255])
def test_a_name_may_have_every_length_that_the_system_allows(length: int, tmp_path: Path) -> None:
    name = "é" * ((length - 12) // 2) + "x" * (length % 2) + ".safetensors"
    assert len(name.encode()) == length

    for _ in range(2):
        assert lm.load(lm.save(small(modules=UNET), tmp_path / name, dialect="kohya"))
    folder = lm.save(small(modules=UNET), tmp_path / name.replace(".safetensors", "x" * 12), dialect="peft")
    assert {path.name for path in tmp_path.iterdir()} == {name, folder.name}
    lm.bake([small(modules=UNET)], base(tmp_path / "base"), tmp_path / f"{folder.name[:-1]}y")


def test_a_name_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(lm.errors.FileError, match="too long"):
        lm.save(small(modules=UNET), tmp_path / f"{'x' * 250}.safetensors")


def test_the_names_of_a_sweep_fit_whatever_its_settings_are(here: Path) -> None:
    Path("recipe.toml").write_text(RECIPE)
    recipe = Recipe.read("recipe.toml")
    weights = [({f"unet.down_blocks.{i}.*": 0.1 * k for i in range(30)},) for k in (1, 2, 3)]

    todo = points(recipe, {"weights": weights})

    assert len({point.file for point in todo}) == 3
    assert max(len(point.file.encode()) for point in todo) <= 240
    assert [point.file for point in points(recipe, {"weights": weights[1:]})] == [point.file for point in todo[1:]]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lbw:1,0,0.5", [("lbw:1,0,0.5",)]),
        ("lbw:1,0,-1e-3,l2", [("lbw:1,0,-1e-3",), "l2"]),
        ("lbw:1,0/lbw:0,1,uniform,0.7/0.5", [("lbw:1,0", "lbw:0,1"), "uniform", (0.7, 0.5)]),
        ("lbw:1,0/0.5,0.7/lbw:1,1,1", [("lbw:1,0", 0.5), (0.7, "lbw:1,1,1")]),
        ("0.5,lbw:1,0", [(0.5,), ("lbw:1,0",)]),
    ],
)
def test_weights_per_block_are_not_cut_at_their_commas(text: str, values: list[object], here: Path) -> None:
    Path("recipe.toml").write_text(RECIPE)

    assert read_grid(Recipe.read("recipe.toml"), [f"weights={text}"])["weights"] == values
