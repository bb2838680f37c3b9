"""Merge methods of other people's packages: found by name, refused by name, and merged with as with loramerge's own."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loramerge as lm
from loramerge.errors import MergeError, OptionError
from loramerge.layers import Layer, LowRank, low_rank
from loramerge.merging.methods import METHODS, Method, combination, find, method, on_core
from loramerge.merging.methods.base import sum_of_ranks
from loramerge.merging.methods.options import TAKEN
from loramerge.merging.recipe_text import Input
from loramerge.registry import from_here
from loramerge.testing import check_method, relative_error, weighted_sum
from small import MODULES, small

CODE = """
from __future__ import annotations
from collections.abc import Sequence
from typing import Annotated
from loramerge.merging.methods import combination
from loramerge.merging.methods.options import Range

@combination("{name}", source="a test")
def {name}(products, weights: Sequence[float], *, power: Annotated[float, Range(0, 2)] = 1.0) -> list[float]:
    '''Weights to a power, an equal share for each LoRA.'''
    {extra}
    return [w**power for w in weights]
"""
WEIGHTS = [0.5, 0.25]


def package(folder: Path, name: str, points: dict[str, str], code: str = "") -> None:
    """An installed package: a module ``NAME_code``, and what a wheel's metadata says of it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{point} = {value}" for point, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[loramerge.methods]", *lines]))
    if code:
        (folder / f"{name}_code.py").write_text(code)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    package(folder, "good", {"powered": "good_code:powered"}, CODE.format(name="powered", extra=""))
    package(folder, "broken", {"splendid": "broken_code:splendid"}, "import a_library_that_is_missing")
    package(folder, "rude", {"rude": "rude_code:rude"}, "raise SystemExit(3)")
    package(folder, "shadow", {"ties": "shadow_code:ties"}, CODE.format(name="ties", extra=""))
    package(folder, "renamed", {"other": "good_code:powered"})
    package(folder, "twice", {"double": "good_code:powered"})
    package(folder, "again", {"double": "shadow_code:ties"})
    package(folder, "plain", {"function": "plain_code:function"}, "def function(): ...")
    return folder


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [lm.save(small(seed=seed), tmp_path / f"{seed}.safetensors", dialect="kohya") for seed in (1, 2)]


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(site)
    for name in [name for name in sys.modules if name.endswith("_code")]:
        monkeypatch.delitem(sys.modules, name)
    return site


def run(*arguments: object, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command, which unlike ``python -m`` does not find modules where it stands."""
    start = "import sys; sys.path.remove(''); from loramerge.cli import main; main()"
    environment = dict(os.environ)
    if path:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def assert_powered(merged: lm.LoRA, power: float, files: list[Path]) -> None:
    loras = [lm.load(file) for file in files]
    for module in merged:
        wanted = weighted_sum(loras, [w**power for w in WEIGHTS], module)
        assert relative_error(merged[module].delta(), wanted) < 1e-6


@pytest.mark.parametrize("how", ["powered", "Powered", "good_code:powered", "object"])
def test_a_method_is_taken_by_every_name_that_it_has(how: str, installed: Path, files: list[Path]) -> None:
    chosen = find("powered") if how == "object" else how

    merged = lm.merge(files, method=chosen, weights=WEIGHTS, power=2.0)

    assert_powered(merged, 2.0, files)
    assert lm.Recipe.of(merged).method == "good_code:powered"
    again = lm.Recipe.of(merged).plan([lm.open(file) for file in files]).lora().in_memory()
    assert all(np.array_equal(again[m].delta(), merged[m].delta()) for m in merged)


def test_the_package_of_the_guide_publishes_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "how-to" / "add-a-method.md").read_text(encoding="utf-8")
    files = dict(re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```$', guide, re.MULTILINE | re.DOTALL))
    published = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"]["loramerge.methods"]
    package(tmp_path, "mymethods", published)
    (tmp_path / "mymethods.py").write_text(files["mymethods.py"], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mymethods", raising=False)

    assert find("equal_norms").reference == "mymethods:equal_norms"


def test_names_are_found_without_importing_a_package(installed: Path) -> None:
    with pytest.raises(OptionError, match=r"Did you mean 'powered'\?.* powered"):
        find("powerd")

    assert not [name for name in sys.modules if name.endswith("_code")]


def test_the_recipe_of_a_stranger_imports_nothing_when_it_is_read(installed: Path, tmp_path: Path) -> None:
    text = 'method = "{}"\noptions = {{ power = 3 }}\n[[loras]]\npath = "a.safetensors"\n'
    for name in ("rude_code:rude", "rude", "powered"):
        (tmp_path / "recipe.toml").write_text(text.format(name))
        assert lm.Recipe.read(tmp_path / "recipe.toml").to_toml().startswith(f'method = "{name}"')
    (tmp_path / "recipe.toml").write_text(text.format("powerd"))
    with pytest.raises(OptionError, match="Did you mean 'powered'"):
        lm.Recipe.read(tmp_path / "recipe.toml")

    assert not [name for name in sys.modules if name.endswith("_code")]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("splendid", r"The package broken 1\.0 .*No module named 'a_library_that_is_missing'.*Way out: install it"),
        ("rude", r"The package rude 1\.0 .*rude_code raised SystemExit"),
        ("other", r"The package renamed 1\.0 .*it is called 'powered'"),
        ("double", r"2 packages publish a method 'double'.*shadow_code:ties \(of again 1\.0\) or good_code:powered"),
        ("function", r"The package plain 1\.0 .*plain_code:function is a function, wanted a merge method"),
        ("shadow_code:ties", "has the name 'ties', which means a method of loramerge"),
        ("good_code:nothing", "the module good_code has no 'nothing'"),
        ("good_code.py:blend", "Way out: good_code:blend"),
        ("good_code:", "wanted package.module:name"),
        ("not/a module:name", "Can't import the method"),
        (None, "is a NoneType, wanted a name"),
    ],
)
def test_a_method_that_can_not_be_used_says_why(name: Any, said: str, installed: Path) -> None:
    with pytest.raises(OptionError, match=said):
        find(name)


def test_a_package_that_is_broken_is_in_nobodys_way(site: Path, files: list[Path], tmp_path: Path) -> None:
    found = json.loads(run("methods", "--json", cwd=tmp_path, path=site).stdout)
    listed = run("methods", cwd=tmp_path, path=site).stdout

    own = [entry["name"] for entry in found if entry["package"] == "loramerge"]
    assert own == list(METHODS)
    assert {e["name"]: e["package"] for e in found if "error" not in e and e["name"] not in own} == {
        "powered": "good 1.0"
    }
    assert {e["name"] for e in found if "error" in e} == {"splendid", "rude", "ties", "other", "double", "function"}
    assert "Weights to a power, an equal share for each LoRA. (of good 1.0)" in listed
    assert "No module named 'a_library_that_is_missing'" in listed
    assert "-O power=1.0" in listed
    assert find("ties") is METHODS["ties"]
    merged = run("merge", *files, "-o", "out.safetensors", "-m", "ties", "-r", 4, cwd=tmp_path, path=site)
    assert merged.returncode == 0, merged.stderr


def test_a_method_beside_where_one_stands_is_typed_but_not_taken_from_a_recipe(
    files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(CODE.format(name="powered", extra=""))
    weights = [text for weight in WEIGHTS for text in ("-w", weight)]

    merged = run(
        "merge", *files, *weights, "-m", "mine:powered", "-O", "power=2", "-o", "out.safetensors", cwd=tmp_path
    )
    assert merged.returncode == 0, merged.stderr
    assert "powered: 4 modules of sdxl" in merged.stdout
    assert_powered(lm.load(tmp_path / "out.safetensors"), 2.0, files)

    recipe = run("inspect", "out.safetensors", "--recipe", cwd=tmp_path)
    assert 'method = "mine:powered"' in recipe.stdout
    (tmp_path / "recipe.toml").write_text(recipe.stdout)
    refused = run("merge", "recipe.toml", "-o", "again.safetensors", cwd=tmp_path)
    assert refused.returncode == 1
    assert "Can't import the method 'mine:powered': No module named 'mine'" in refused.stderr
    for way_out in ({"path": tmp_path}, {}):
        typed = [] if way_out else ["-m", "mine:powered"]
        done = run("merge", "recipe.toml", "-o", "again.safetensors", *typed, cwd=tmp_path, **way_out)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
@pytest.mark.parametrize(("late", "processes"), [("", 2), ("import torch; torch.ones(9).sum()", 1)])
def test_workers_merge_by_it_too(late: str, processes: int, files: list[Path], tmp_path: Path) -> None:
    if "torch" in late:
        pytest.importorskip("torch")
    noted = f"import os; print(os.getpid(), file=open('processes', 'a')); {late}"
    (tmp_path / "mine.py").write_text(CODE.format(name="powered", extra=noted))
    merge = ["merge", *files, "-m", "mine:powered", "-q", "-o"]

    for workers in (1, 2):
        (tmp_path / "processes").unlink(missing_ok=True)
        done = run(*merge, f"by-{workers}.safetensors", "-j", workers, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    assert min(2, len(set((tmp_path / "processes").read_text().split()))) == processes
    assert (tmp_path / "by-1.safetensors").read_bytes() == (tmp_path / "by-2.safetensors").read_bytes()


def test_a_sweep_takes_it_and_makes_a_merge_again_when_its_code_has_changed(files: list[Path], tmp_path: Path) -> None:
    recipe = "".join(f'[[loras]]\npath = "{file.name}"\nweight = {w}\n' for file, w in zip(files, WEIGHTS, strict=True))
    (tmp_path / "recipe.toml").write_text(recipe)
    sweep = ["sweep", "recipe.toml", "-s", "method=linear,mine:powered", "-s", "power=1,2", "-o", "out"]

    for code, there in ((CODE, ""), (CODE, ", 3 of them there already"), (CODE + "\n", ", 1 of them there already")):
        (tmp_path / "mine.py").write_text(code.format(name="powered", extra=""))
        done = run(*sweep, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"3 merges{there}, sweep.csv" in done.stdout

    assert_powered(lm.load(tmp_path / "out" / "mine-powered_power=2.0.safetensors"), 2.0, files)


def test_a_method_whose_code_can_not_be_compared_is_swept_anew(files: list[Path], tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "nowhere"}
    exec(CODE.format(name="powered", extra=""), namespace)
    recipe = lm.Recipe(loras=tuple(Input(path=str(file)) for file in files))

    for methods in (["linear"], [namespace["powered"]]):
        rows = [lm.sweep(recipe, {"method": methods}, tmp_path / "out")[0] for _ in range(2)]
        assert [row.reused for row in rows] == [False, methods == ["linear"]]


def test_modules_beside_where_one_stands_are_found_for_one_import_only() -> None:
    before = list(sys.path)

    with from_here():
        assert sys.path == ["", *before]

    assert sys.path == before


def bare() -> Method:
    @combination("bare", source="a test")
    def formula(products: object, weights: Sequence[float]) -> Sequence[float]:
        """The weights as they are, from nowhere."""
        return weights

    return formula


def test_a_method_without_a_module_merges_and_its_recipe_says_that_it_can_not_be_run_again(
    files: list[Path], tmp_path: Path
) -> None:
    merged = lm.merge(files, method=bare(), weights=WEIGHTS)

    assert_powered(merged, 1.0, files)
    with pytest.raises(MergeError, match=r"its method 'bare' is not one of loramerge's.*Way out: put it into a file"):
        lm.Recipe.of(merged)
    recipe = lm.Recipe(loras=(), method=bare())
    with pytest.raises(OptionError, match="'bare' has no place in a recipe"):
        recipe.to_toml()
    assert lm.Recipe(loras=(), method=METHODS["ties"]).to_toml().startswith('method = "ties"')


def made(layer: Any) -> Method:
    @method("made", source="a test", rank=sum_of_ranks)
    def merge(layers: Sequence[Layer], weights: Sequence[float]) -> Any:
        """Whatever a test wants."""
        return layer(layers) if callable(layer) else layer

    return merge


def wide(layers: Sequence[Layer]) -> LowRank:
    up, down = (np.concatenate([x] * 3, axis=i) for i, x in zip((1, 0), layers[0].factors(), strict=True))
    return LowRank(up=up, down=down)


def spoiled(layers: Sequence[Layer]) -> LowRank:
    up, down = layers[0].factors()
    return LowRank(up=up * np.float32("nan"), down=down)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (np.ones((3, 3)), "gave a ndarray, wanted a LowRank or Full layer"),
        (
            lambda layers: LowRank(up=np.ones((3, 1), np.float32), down=np.ones((1, 3), np.float32)),
            "gave a layer of the shape",
        ),
        (wide, "gave the rank 12, and its rank= announced 8"),
        (spoiled, "NaN or infinite"),
        (lambda layers: 1 // 0, "raised ZeroDivisionError"),
    ],
)
def test_what_a_method_gives_is_looked_at(layer: Any, said: str) -> None:
    module = MODULES["sdxl"][0]
    loras = [small(seed=seed, modules=(module,)) for seed in (1, 2)]

    with pytest.raises(lm.errors.LoRAMergeError, match=f"^{module}: .*{said}"):
        lm.merge(loras, method=made(layer))


def halved(layers: Sequence[Layer]) -> LowRank:
    up, down = layers[0].factors()
    return LowRank(up=up, down=down, alpha=up.shape[1] / 2, up_bias=np.ones(len(up), np.float32))


def with_a_core(layers: Sequence[Layer]) -> LowRank:
    up, down = layers[0].factors()
    rank = up.shape[1]
    core = np.random.default_rng(0).normal(size=(rank, rank, 3, 3)).astype("float32")
    return LowRank(up=up[..., None, None], down=down[:, ::9, None, None], mid=core)


@pytest.mark.parametrize("layer", [halved, with_a_core])
@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"rank": 12}, {"max_error": 0.5}])
def test_a_methods_alpha_core_and_bias_are_part_of_its_result(layer: Any, options: dict[str, Any]) -> None:
    module = "unet.down_blocks.0.resnets.0.conv1" if layer is with_a_core else MODULES["sdxl"][0]
    loras = [small(seed=seed, modules=(module,)) for seed in (1, 2)]
    given = layer([loras[0][module]])
    left, values, right = np.linalg.svd(given.delta().reshape(given.shape[0], -1).astype(float), full_matrices=False)

    found = lm.merge(loras, method=made(layer), **options)[module]

    kept = len(values) if not options else found.rank
    if "max_error" in options:
        assert values[kept:] @ values[kept:] <= 0.25 * values @ values < values[kept - 1 :] @ values[kept - 1 :]
    wanted = ((left * values)[:, :kept] @ right[:kept]).reshape(given.shape)
    assert relative_error(found.delta(), wanted) < 1e-5
    if given.up_bias is not None:
        assert np.allclose(found.delta_bias(), 0.5)


def test_a_method_that_is_said_to_be_linear_keeps_what_modules_share() -> None:
    modules = tuple(f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv")
    keys = small("flux", modules).state_dict("kohya")
    loras = [lm.load(keys), lm.load(keys)]

    @method("careless", source="a test", rank=sum_of_ranks, linear=True)
    def careless(layers: Sequence[Layer], weights: Sequence[float]) -> LowRank:
        """A sum in factors of its own."""
        ups, downs = zip(*(layer.factors() for layer in layers), strict=True)
        return LowRank(up=np.concatenate(ups, axis=1), down=np.concatenate(downs))

    assert lm.merge(loras, method="linear")
    with pytest.raises(MergeError, match="is said to be linear, and doesn't keep the down"):
        lm.merge(loras, method=careless)


def test_an_option_that_could_never_be_given_is_refused_when_the_method_is_made() -> None:
    import inspect

    arguments = inspect.signature(lm.merge).parameters
    assert {name for name in arguments if name != "options"} <= set(TAKEN)

    with pytest.raises(TypeError, match="Option 'rank' of formula: merging has an argument of that name"):

        @on_core("strange", source="a test")
        def formula(core: object, weights: object, *, rank: int = 3) -> None:
            """Something."""


@pytest.mark.parametrize(
    ("change", "law"),
    [
        (lambda up: up * 0, "the result is not zero"),
        (lambda up: up + 1, "LoRAs of zeros give zeros"),
        (lambda up: up / np.float32(abs(up).max() or 1), "LoRAs twice as strong give twice the result"),
        (lambda up: up * (1 if isinstance(up, np.ndarray) else 2), "torch computes what numpy computes"),
    ],
)
def test_a_law_that_a_method_breaks_is_named(change: Any, law: str) -> None:
    def first(layers: Sequence[Layer]) -> LowRank:
        up, down = layers[0].factors()
        return low_rank(change(up), down * 0 + 1 if law.startswith("LoRAs of") else down, layers[0].shape)

    with pytest.raises(AssertionError, match=f"made, layers of the shape .*: it doesn't hold that {law}"):
        check_method(made(first))
