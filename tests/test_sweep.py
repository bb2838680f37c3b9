"""Sweeps: every combination once, measured against dense algebra, and taken up where they stopped."""

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loramerge as lm
from loramerge.errors import MergeError, OptionError
from loramerge.merging import Coefficients, Input, sweeping
from loramerge.merging.figures import extent, measure
from loramerge.merging.grid import left_out, points
from loramerge.merging.ledger import ordered
from loramerge.merging.recipe import Recipe
from loramerge.testing import random_lora
from small import MODULES, small

UNET = MODULES["sdxl"][:1]
WEIGHTS = [0.7, 0.5]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    lm.save(small(seed=1, alpha=2.0), tmp_path / "person.safetensors", dialect="kohya")
    lm.save(small(seed=2, rank=6, modules=MODULES["sdxl"][:3]), tmp_path / "jersey.safetensors", dialect="diffusers")
    loras = [f'[[loras]]\npath = "{n}.safetensors"\nweight = {w}\n' for n, w in zip(("person", "jersey"), WEIGHTS, strict=True)]  # fmt: skip
    (tmp_path / "recipe.toml").write_text("".join(loras))
    return tmp_path / "recipe.toml"


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loramerge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def dense(lora: lm.LoRA, modules: tuple[str, ...]) -> np.ndarray:
    """The whole update as one long float64 vector."""
    parts = [
        np.asarray(lora[m].delta(), np.float64).ravel() if m in lora else np.zeros(size(m)) for m in modules
    ]  # fmt: skip
    return np.concatenate(parts)


def size(module: str) -> int:
    return int(np.prod(small(modules=(module,)).layout(module).shape))


@pytest.mark.parametrize(
    "settings",
    [{"method": ["linear"]}, {"method": ["ties"], "rank": [3]}, {"weights": ["l2"]}, {"rank": [2], "to": ["comfyui"]}],
)
def test_figures_are_those_of_dense_algebra(settings: dict[str, list[object]], recipe: Path, tmp_path: Path) -> None:
    (row,) = lm.sweep(recipe, settings, tmp_path / "out")

    parents = [lm.load(tmp_path / f"{name}.safetensors") for name in ("person", "jersey")]
    modules = MODULES["sdxl"]
    merged, (person, jersey) = dense(lm.load(row.path), modules), (dense(p, modules) for p in parents)
    plan = Recipe.read(recipe).override(**{k: v[0] for k, v in settings.items()}).plan()
    each = np.concatenate([np.tile(plan.weights.of(m), (size(m), 1)) for m in modules]).T
    total = each[0] * person + each[1] * jersey
    assert row["kept:person.safetensors"] == pytest.approx(merged @ person / (person @ person), rel=1e-6, abs=1e-9)
    assert row["kept:jersey.safetensors"] == pytest.approx(merged @ jersey / (jersey @ jersey), rel=1e-6, abs=1e-9)
    wanted = np.linalg.norm(merged - total) / np.linalg.norm(total)
    assert row["interference"] == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    if settings.get("rank") == [2]:
        assert row["error"] == pytest.approx(wanted, rel=1e-5)
    assert row["size"] == row.path.stat().st_size
    ranks = [layer.rank for layer in lm.load(row.path).values()]
    assert (row["rank_min"], row["rank_max"]) == (min(ranks), max(ranks))


def test_the_cut_has_its_own_error(recipe: Path, tmp_path: Path) -> None:
    whole, cut = lm.sweep(recipe, {"method": ["ties"], "rank": ["sum", 2]}, tmp_path / "out")
    exact = lm.plan([tmp_path / "person.safetensors", tmp_path / "jersey.safetensors"], weights=WEIGHTS, method="ties")
    deltas = {m: np.asarray(exact.merger.uncut(step).delta(), np.float64) for m, step in exact.steps.items()}

    for row in (whole, cut):
        merged = lm.load(row.path)
        lost = sum(np.linalg.norm(d - np.asarray(merged[m].delta()).reshape(d.shape)) ** 2 for m, d in deltas.items())
        wanted = np.sqrt(lost / sum(np.linalg.norm(d) ** 2 for d in deltas.values()))
        assert row["error"] == pytest.approx(wanted, rel=1e-3)


def test_a_merge_in_a_sweep_is_the_merge_alone(recipe: Path, tmp_path: Path) -> None:
    rows = lm.sweep(recipe, {"method": ["dare"], "seed": [1, 2]}, tmp_path / "out")
    alone = Recipe.read(recipe).override(method="dare", options={"seed": 2}).run(tmp_path / "alone.safetensors")

    assert rows[1].path.read_bytes() == alone.read_bytes()
    assert rows[0].path.read_bytes() != alone.read_bytes()


def test_options_that_a_method_lacks_are_left_out_and_equal_points_run_once(recipe: Path) -> None:
    given, grid = Recipe.read(recipe), {"method": ["linear", "ties", "dare"], "density": [0.1, 0.3], "seed": [1]}

    found = points(given, grid)

    assert [p.name for p in found] == [
        "linear", "ties_density=0.1", "ties_density=0.3", "dare_density=0.1_seed=1", "dare_density=0.3_seed=1"
    ]  # fmt: skip
    assert left_out(given, grid) == {"density": ["linear"], "seed": ["linear", "ties"]}


def test_names_of_points_are_names_of_files_and_differ(recipe: Path) -> None:
    weights = [[{"unet": 1.0, "*attn*": 0.5}, "lbw:1,0/2"], [{"unet": 1.0, "?attn?": 0.5}, "lbw:1,0/2"]]

    names = [p.name for p in points(Recipe.read(recipe), {"weights": weights})]

    assert len(set(names)) == 2
    assert not any(set(name) & set('/\\:*?"<>|') for name in names)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"densty": [1]}, "Unknown setting 'densty'. Did you mean 'density'?"),
        ({"method": ["tise"]}, "Did you mean 'ties'?"),
        ({"density": [2.0]}, "density wants a number"),
        ({"density": 0.5}, "wanted a list"),
        ({"density": []}, "wanted a list"),
        ({"rank": [3, 0]}, "The rank 0"),
        ({"max_error": [0.1, 3]}, "max_error is a share"),
    ],
)
def test_a_wrong_grid_merges_nothing(grid: dict[str, object], message: str, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message.replace("?", r"\?")):
        lm.sweep(Recipe.read(recipe).override(method="ties"), grid, tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_kept_and_what_is_not_is_made(recipe: Path, tmp_path: Path) -> None:
    grid = {"rank": [1, 2, 3], "max_error": ["95%"]}
    first = lm.sweep(recipe, grid, tmp_path / "out")
    first[0].path.unlink()
    times = [row.path.stat().st_mtime_ns for row in first[1:]]

    second = lm.sweep(recipe, grid, tmp_path / "out")

    assert [row.reused for row in second] == [False, True, True]
    assert [row.path.stat().st_mtime_ns for row in second[1:]] == times
    assert [row.figures for row in second] == [row.figures for row in first]


def test_a_changed_input_or_recipe_is_merged_again(recipe: Path, tmp_path: Path) -> None:
    lm.sweep(recipe, {"rank": [1]}, tmp_path / "out")
    lm.save(small(seed=5), tmp_path / "person.safetensors", dialect="kohya")
    (changed,) = lm.sweep(recipe, {"rank": [1]}, tmp_path / "out")
    (other,) = lm.sweep(Recipe.read(recipe).override(weights=(0.1, 0.2)), {"rank": [1]}, tmp_path / "out")
    (same,) = lm.sweep(Recipe.read(recipe).override(weights=(0.1, 0.2)), {"rank": [1]}, tmp_path / "out")

    assert [row.reused for row in (changed, other, same)] == [False, False, True]


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
def test_a_sweep_does_not_write_over_an_input(dialect: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    read = lm.save(small(), tmp_path / "out" / "rank=2.safetensors", dialect=dialect)
    before = lm.load(read).sha256

    with pytest.raises(OptionError, match=r"rank=2.* is one of the LoRAs that are merged"):
        lm.sweep(Recipe(loras=(Input(path=str(read)),)), {"rank": [1, 2]}, tmp_path / "out")

    assert lm.load(read).sha256 == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == [read.name]


@pytest.mark.parametrize("saved", [True, False])
def test_changed_learned_weights_are_merged_again(saved: bool, recipe: Path, tmp_path: Path) -> None:
    loras = lm.Recipe.read(recipe).open()
    modules = {module: lora.layout(module).shape for lora in loras for module in lora}

    def swept(value: float) -> sweeping.Row:
        columns = {m: np.full((2, math.prod(shape[1:])), value, np.float32) for m, shape in modules.items()}
        found = Coefficients.of(columns, loras, [1.0, 1.0])
        weights = str(found.save(tmp_path / "learned.safetensors")) if saved else found
        (row,) = lm.sweep(Recipe.read(recipe).override(weights=weights), {"rank": ["sum"]}, tmp_path / "out")
        return row

    first, same, changed = swept(1.0), swept(1.0), swept(0.5)

    assert [row.reused for row in (first, same, changed)] == [False, True, False]
    assert lm.load(changed.path).norm() == pytest.approx(0.5 * lm.merge(loras, weights="sum").norm(), rel=1e-5)


def test_a_sweep_that_stopped_goes_on(recipe: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lm.sweep(recipe, {"rank": [1, 2, 3]}, tmp_path / "out", progress=stop)

    assert [row.reused for row in lm.sweep(recipe, {"rank": [1, 2, 3]}, tmp_path / "out")] == [True, True, False]


def test_a_file_that_was_replaced_does_not_keep_the_old_ones_figures(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    lm.sweep(recipe, {"rank": [1]}, tmp_path / "out")
    lm.save(small(seed=5), tmp_path / "person.safetensors", dialect="kohya")
    with monkeypatch.context() as patched:
        patched.setattr(sweeping, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            lm.sweep(recipe, {"rank": [1]}, tmp_path / "out")

    (found,) = lm.sweep(recipe, {"rank": [1]}, tmp_path / "out")
    (wanted,) = lm.sweep(recipe, {"rank": [1]}, tmp_path / "fresh")
    assert found.figures == wanted.figures


def test_a_scores_columns_join_the_table_and_are_not_asked_for_twice(recipe: Path, tmp_path: Path) -> None:
    first = lm.sweep(recipe, {"rank": [1, 2]}, tmp_path / "out", score=norm)
    calls.clear()
    second = lm.sweep(recipe, {"rank": [1, 2]}, tmp_path / "out", score=norm)
    lm.sweep(recipe, {"rank": [1, 2]}, tmp_path / "out", score=lambda lora: {"modules": len(lora)})

    for row in first:
        assert row["norm"] == pytest.approx(lm.load(row.path).norm())
    assert (calls, [r.figures for r in second]) == ([], [r.figures for r in first])
    assert "norm" not in json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"][0]["scores"]


calls: list[str] = []


def norm(lora: lm.LoRA) -> dict[str, float]:
    calls.append(lora.name)
    return {"norm": lora.norm()}


@pytest.mark.parametrize("found", [3, {"a": "x"}, {"size": 1.0}, {3: 1.0}, {"a": True}])
def test_a_score_that_gives_no_numbers_is_refused(found: object, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="score"):
        lm.sweep(recipe, {"rank": [1]}, tmp_path / "out", score=lambda lora: found)  # type: ignore[arg-type, return-value]


def test_tables_hold_every_row(recipe: Path, tmp_path: Path) -> None:
    rows = lm.sweep(recipe, {"method": ["linear", "ties"], "density": [0.25]}, tmp_path / "out", score=norm)

    with (tmp_path / "out" / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    data = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]

    assert [line["name"] for line in table] == [entry["name"] for entry in data] == ["linear", "ties_density=0.25"]
    assert [line["density"] for line in table] == ["", "0.25"]
    for row, line, entry in zip(rows, table, data, strict=True):
        assert row.figures == entry["figures"] | entry["scores"] == {c: float(line[c]) for c in row.figures}


def test_rows_are_ordered_by_a_column(recipe: Path, tmp_path: Path) -> None:
    rows = lm.sweep(recipe, {"rank": [2, 1, 3]}, tmp_path / "out")

    assert [row["rank"] for row in ordered(rows, "error")] == [3, 2, 1]
    assert [row["rank"] for row in ordered(rows, "-error")] == [1, 2, 3]
    with pytest.raises(OptionError, match="Did you mean 'error'"):
        ordered(rows, "eror")


def test_the_command_line_sweeps(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text("def norm(lora):\n    return {'norm': lora.norm()}\n")
    arguments = (
        "sweep", "recipe.toml", "--set", "method=linear,ties", "--set", "density=0.1,0.3", "--set", "weights=0.7/0.5,l2",
        "-o", "out", "--score", "scores:norm", "--sort", "-norm",
    )  # fmt: skip
    names = run(*arguments, "--dry-run", cwd=tmp_path)
    first, second = run(*arguments, cwd=tmp_path), run(*arguments, cwd=tmp_path)

    assert (names.returncode, first.returncode) == (0, 0), first.stderr
    assert "ties_density=0.1_weights=0.7+0.5" in names.stdout
    assert "note: density is left out for linear" in first.stdout
    assert "8 combinations, of which 6 differ" in first.stdout
    assert "6 of them there already" in second.stdout
    lines = [line.split() for line in first.stdout.splitlines() if line.startswith(("linear", "ties"))]
    assert len(lines) == 6
    norms = [float(line[-1]) for line in lines]
    assert norms == sorted(norms, reverse=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "method"], "wanted NAME=VALUE"),
        (["--set", "rank=1", "--set", "rank=2"], "each name once"),
        (["--set", "rank=1", "--score", "nowhere:f"], "Can't import the score"),
        (["--set", "rank=1", "--score", "math:nothing"], "has no 'nothing'"),
        (["--set", "rank=one"], "The rank 'one'"),
        (["--set", "weights=1"], "One weight per LoRA: --set weights=0.7/0.5."),
        (["--set", "rank=1", "-o", "recipe.toml"], "Can't make the directory recipe.toml: File exists"),
        (["--set", "method=slerp", "--set", "weights=1/-1"], "slerp_weights=1.0+-1.0: "),
    ],
)
def test_a_wrong_sweep_is_one_readable_error(arguments: list[str], message: str, recipe: Path, tmp_path: Path) -> None:
    result = run("sweep", "recipe.toml", "-o", "out", *arguments, cwd=tmp_path)

    assert (result.returncode, message in result.stderr) == (1, True), result.stderr
    assert "Traceback" not in result.stderr


def test_a_changed_input_of_a_recipe_with_hashes_is_refused(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text() + f"sha256 = '{'0' * 64}'\n")

    with pytest.raises(MergeError, match=r"jersey.safetensors has changed"):
        lm.sweep(recipe, {"rank": [1]}, tmp_path / "out")
    (row,) = lm.sweep(recipe, {"rank": [1]}, tmp_path / "out", allow_changed=True)
    assert row.path.exists()


def test_a_merge_that_fails_does_not_end_the_sweep(recipe: Path, tmp_path: Path) -> None:
    rows = lm.sweep(recipe, {"max_size": ["1kB", "1MB"], "rank": [2]}, tmp_path / "out")

    with (tmp_path / "out" / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    data = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
    assert [(row.failed or "")[:14] for row in rows] == ["max_size=1000:", ""]
    assert [bool(row.figures) for row in rows] == [False, True]
    assert [line["failed"][:14] for line in table] == [entry.get("failed", "")[:14] for entry in data]
    assert [row.reused for row in lm.sweep(recipe, {"max_size": ["1kB", "1MB"], "rank": [2]}, tmp_path / "out")] == [
        False,
        True,
    ]


def test_a_score_that_raises_leaves_the_merge_and_its_figures(recipe: Path, tmp_path: Path) -> None:
    def score(lora: lm.LoRA) -> dict[str, float]:
        if "rank=1" in lora.name:
            raise ValueError("no picture")
        return {"good": 1.0}

    first, second = lm.sweep(recipe, {"rank": [1, 2]}, tmp_path / "out", score=score)

    assert (first.failed, second.failed) == ("the score raised ValueError: no picture", None)
    assert first["size"] == first.path.stat().st_size
    assert (first["good"], second["good"]) == (None, 1.0)
    assert lm.sweep(recipe, {"rank": [1, 2]}, tmp_path / "out")[0].reused


def test_a_sweep_of_which_every_merge_fails_is_an_error(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="max_size=1kB: max_size=1000: can't be met"):
        lm.sweep(recipe, {"max_size": ["1kB", "2kB"]}, tmp_path / "out")


def test_the_command_line_says_what_failed_at_the_end(recipe: Path, tmp_path: Path) -> None:
    result = run("sweep", "recipe.toml", "--set", "max_size=1kB,1MB", "-o", "out", cwd=tmp_path)

    assert result.returncode == 1
    assert [line.split()[1] == "failed" for line in result.stdout.splitlines() if line.startswith("max")] == [
        True,
        False,
    ]
    assert "error: max_size=1kB: max_size=1000: can't be met" in result.stderr


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_layers_without_factors_are_measured_as_dense_matrices(kind: str, tmp_path: Path) -> None:
    base = np.random.default_rng(0).standard_normal((640, 640), dtype=np.float32)
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    save_file({key: base}, tmp_path / "base.safetensors")
    lm.save(small(seed=1, modules=UNET, kind=kind), tmp_path / "person.safetensors", dialect="kohya")
    lm.save(small(seed=2, modules=UNET), tmp_path / "jersey.safetensors", dialect="kohya")
    loras = [f'[[loras]]\npath = "{n}.safetensors"\nweight = {w}\n' for n, w in zip(("person", "jersey"), WEIGHTS, strict=True)]  # fmt: skip
    (tmp_path / "recipe.toml").write_text('base = "base.safetensors"\n' + "".join(loras))

    (row,) = lm.sweep(tmp_path / "recipe.toml", {"rank": [3]}, tmp_path / "out")

    person, jersey = (lm.load(tmp_path / f"{n}.safetensors")[UNET[0]].delta_on(base).ravel() for n in ("person", "jersey"))  # fmt: skip
    merged, total = lm.load(row.path)[UNET[0]].delta().ravel(), WEIGHTS[0] * person + WEIGHTS[1] * jersey
    assert row["kept:person.safetensors"] == pytest.approx(merged @ person / (person @ person), rel=1e-3)
    assert row["kept:jersey.safetensors"] == pytest.approx(merged @ jersey / (jersey @ jersey), rel=1e-3, abs=1e-4)
    assert row["interference"] == pytest.approx(np.linalg.norm(merged - total) / np.linalg.norm(total), rel=1e-4)


def test_learned_weights_are_measured_per_column(recipe: Path, tmp_path: Path) -> None:
    loras = lm.Recipe.read(recipe).open()
    shapes = {module: lora.layout(module).shape for lora in loras for module in lora}
    rng = np.random.default_rng(0)
    columns = {m: rng.random((len(loras), math.prod(s[1:])), dtype=np.float32) for m, s in shapes.items()}
    saved = Coefficients.of(columns, loras, [1.0] * len(loras)).save(tmp_path / "learned.safetensors")

    (row,) = lm.sweep(recipe, {"weights": [str(saved)]}, tmp_path / "out")
    typed = run("sweep", recipe, "-o", "typed", "--set", f"weights={saved.name}", cwd=tmp_path)

    assert row.failed is None
    assert row["interference"] < 1e-6
    assert typed.returncode == 0
    assert "1 merge" in typed.stdout


@pytest.mark.parametrize("weights", [(0.7, 0.5, 0.2), (1.0, -1.0, 1e-5), (1.0, -0.5, -0.5)])
@pytest.mark.parametrize("rounding", [0.0, 1e-2, 1e-4, 1e-7])
def test_interference_keeps_its_digits_where_a_merge_is_nearly_the_sum(
    weights: tuple[float, ...], rounding: float
) -> None:
    first = small(seed=1, modules=UNET)
    planned = lm.plan([first, replace(first, name="again"), small(seed=2, modules=UNET)], weights=weights)
    layer = planned.lora()[UNET[0]]
    noise = np.random.default_rng(0).standard_normal(layer.up.shape)
    merged = replace(planned.lora(), compute=lambda _: replace(layer, up=layer.up * (1 + rounding * noise)))

    found = measure(merged, planned, {})

    result, *parents = (np.matmul(*lora[UNET[0]].factors(), dtype=np.float64) for lora in (merged, *planned.loras))
    total = sum(w * parent for w, parent in zip(weights, parents, strict=True))
    wanted = np.linalg.norm(result - total) / np.linalg.norm(total)
    assert found["interference"] == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_what_a_sweep_shares_changes_no_figure(recipe: Path, tmp_path: Path) -> None:
    grid = {"weights": [[0.7, 0.5], [0.0, 1.0], [1.0, 0.0], "l2"], "method": ["linear", "ties"], "rank": ["sum", 2]}
    together = lm.sweep(recipe, grid, tmp_path / "out")

    alone = [lm.sweep(point.recipe, {}, tmp_path / point.name)[0] for point in points(Recipe.read(recipe), grid)]

    assert [row.figures for row in together] == [row.figures for row in alone]


def test_parents_of_one_name_have_a_column_each() -> None:
    loras = [replace(small(seed=seed), name="same") for seed in (1, 2, 3)]
    planned = lm.plan(loras)

    found = measure(planned.lora(), planned, {})

    assert [*found] == ["kept:same", "kept:same_2", "kept:same_3", "interference"]


def test_a_merge_without_ranks_has_none_in_the_table(tmp_path: Path) -> None:
    norms = random_lora("qwen-image", kind="norm", only=lambda module, shape: len(shape) == 1 and "blocks.0." in module)
    file = lm.save(norms, tmp_path / "norms.safetensors")

    assert extent(lm.load(file), file) == {"size": file.stat().st_size, "rank_min": None, "rank_max": None}
