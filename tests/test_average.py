"""An average of checkpoints is that of ΔW, over the steps that they stand for."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import loramerge as lm
from loramerge import LoRA
from loramerge.cli.app import app
from loramerge.files.storage.reader import SafetensorsFile
from loramerge.layers import low_rank
from loramerge.merging.averaging import gamma_of
from loramerge.merging.timeline import timeline
from loramerge.testing import random_lora, relative_error, weighted_sum
from small import small

RANK, OUT, IN = 4, 48, 40
MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def trained(count: int = 8, seed: int = 0) -> list[LoRA]:
    """Checkpoints of Adam on the factors of a noisy target, as a trainer makes them: ``up`` begins at 0."""
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((OUT, 6)) @ rng.standard_normal((6, IN)) / 6
    factors = [np.zeros((OUT, RANK)), rng.standard_normal((RANK, IN)) / math.sqrt(IN)]
    means, squares, found = [0.0, 0.0], [0.0, 0.0], []
    for step in range(1, 40 * count + 1):
        up, down = factors
        error = up @ down - target - rng.standard_normal((OUT, IN))
        for i, gradient in enumerate((error @ down.T, up.T @ error)):
            means[i] = 0.9 * means[i] + 0.1 * gradient
            squares[i] = 0.999 * squares[i] + 0.001 * gradient**2
            scaled = means[i] / (1 - 0.9**step) / (np.sqrt(squares[i] / (1 - 0.999**step)) + 1e-8)
            factors[i] = factors[i] - 0.003 * scaled
        if step % 40 == 0:
            layer = low_rank(*(factor.astype(np.float32) for factor in factors), (OUT, IN))
            name = f"person-{step:06d}.safetensors"
            found.append(LoRA(name=name, architecture=None, dialect="kohya", layouts={MODULE: layer}))
    return found


def dense(loras: list[LoRA]) -> list[np.ndarray]:
    return [np.asarray(lora[MODULE].delta(), np.float64) for lora in loras]


def recursive(deltas: list[np.ndarray], steps: list[int], gamma: float | None, beta: float = 0.0) -> np.ndarray:
    """The EMA as training computes it, a step at a time, where ΔW of a step is the next checkpoint's."""
    average = np.zeros_like(deltas[0])
    started = False
    for t in range(1, max(steps) + 1):
        current = next(delta for delta, step in zip(deltas, steps, strict=True) if step >= t)
        decay = beta if gamma is None else (1 - 1 / t) ** (gamma + 1)
        average = decay * average + (1 - decay) * current if started else current
        started = True
    return average


def best(exact: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(exact)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize(
    ("ema", "beta"), [("sigma=0.05", None), ("sigma=0.15", None), ("sigma=0.25", None), ("beta=0.99", 0.99)]
)
def test_an_ema_is_the_one_that_training_computes_step_by_step(ema: str, beta: float | None) -> None:
    run = trained(6)
    chosen, steps = [run[i] for i in (0, 2, 3, 5)], [40, 120, 160, 240]
    gamma = None if beta else gamma_of(float(ema.partition("=")[2]))

    found = lm.average(chosen, ema=ema, steps=steps, rank="sum")

    wanted = recursive(dense(chosen), steps, gamma, beta or 0.0)
    assert relative_error(found[MODULE].delta(), wanted) <= 1e-6


def test_the_mean_is_that_of_delta_at_the_runs_own_rank() -> None:
    run = trained()
    exact = sum(dense(run)) / len(run)

    found = lm.average(run)

    nearest = best(exact, RANK)
    assert found[MODULE].rank == RANK
    assert np.linalg.norm(found[MODULE].delta() - exact) <= np.linalg.norm(nearest - exact) * (1 + 1e-4)
    assert relative_error(found[MODULE].delta(), nearest) <= 1e-5


def test_the_error_of_the_cut_is_told() -> None:
    run = trained()
    exact = sum(dense(run)) / len(run)

    *_, told = lm.average(run).notes

    wanted = 100 * relative_error(best(exact, RANK), exact)
    assert f"relative error {wanted:.3g} %" in told


def test_it_is_nearer_than_an_average_of_factors() -> None:
    run = trained()
    exact = sum(dense(run)) / len(run)
    layers = [lora[MODULE] for lora in run]
    factors = sum(layer.up for layer in layers) @ sum(layer.down for layer in layers) / len(run) ** 2

    assert relative_error(factors, exact) > 2 * relative_error(lm.average(run)[MODULE].delta(), exact)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.28])
def test_sigma_is_the_width_of_the_average(sigma: float) -> None:
    t = (np.arange(200_000) + 0.5) / 200_000
    profile = t ** gamma_of(sigma)

    mean = np.average(t, weights=profile)

    assert math.isclose(math.sqrt(np.average((t - mean) ** 2, weights=profile)), sigma, rel_tol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "tucker", "full"])
def test_every_kind_is_averaged(kind: str) -> None:
    run = [small(kind=kind, rank=2, alpha=3, seed=seed) for seed in range(3)]

    found = lm.average(run, rank="sum")

    for module in found:
        assert relative_error(found[module].delta(), weighted_sum(run, [1 / 3] * 3, module)) <= 1e-6


def test_the_order_of_the_files_is_of_no_account() -> None:
    run = trained(4)

    forth = lm.average(run, ema="sigma=0.1")
    back = lm.average(run[::-1], ema="sigma=0.1")

    assert relative_error(forth[MODULE].delta(), back[MODULE].delta()) <= 1e-5


NAMES = {
    "kohya, epochs": (["p/person-000002", "p/person-000010"], "number", (2, 10)),
    "kohya, steps": (["p/person-step00000500", "p/person-step00001000"], "step", (500, 1000)),
    "ai-toolkit": (["p/person_000000500", "p/person_000001000"], "number", (500, 1000)),
    "diffusers": (["checkpoint-500/pytorch_lora_weights", "checkpoint-1000/pytorch_lora_weights"], "step", (500, 1000)),
    "diffusion-pipe": (["epoch10/adapter_model", "epoch20/adapter_model"], "epoch", (10, 20)),
    "OneTrainer": (
        ["s/a2026-05-01_10-22-33-save-1500-10-0", "s/a2026-05-01_11-02-03-save-3000-20-0"],
        "step",
        (1500, 3000),
    ),
    "a number that all have": (["v2/style3-1", "v2/style3-2"], "number", (1, 2)),
}


@pytest.mark.parametrize("tool", NAMES)
def test_names_say_the_step(tool: str) -> None:
    names, unit, numbers = NAMES[tool]

    found = timeline([{}] * len(names), names)

    assert (found.unit, found.numbers) == (unit, numbers)


@pytest.mark.parametrize(
    ("headers", "unit"),
    [
        ([{"ss_steps": "500", "ss_epoch": "1"}, {"ss_steps": "1000", "ss_epoch": "2"}], "step"),
        ([{"training_info": json.dumps({"step": s, "epoch": 1})} for s in (500, 1000)], "step"),
        ([{"ss_epoch": "500"}, {"ss_epoch": "1000"}], "epoch"),
    ],
)
def test_metadata_say_the_step_even_if_a_name_does_not(headers: list[dict[str, str]], unit: str) -> None:
    found = timeline(headers, ["person-000001", "person"])

    assert (found.unit, found.numbers) == (unit, (500, 1000))


@pytest.mark.parametrize(
    ("headers", "names"),
    [
        ([{}, {}], ["p/person-000010", "p/person"]),
        ([{}, {}], ["p/first", "p/second"]),
        ([{}, {}], ["a1/b1", "a2/b2"]),
        ([{"ss_steps": "7"}, {"ss_steps": "7"}], ["p/first", "p/second"]),
        ([{"ss_steps": "500"}, {}], ["p/first", "p/second"]),
        ([{"ss_steps": "1000"}, {"ss_steps": "500"}], ["p/person-000001", "p/person-000002"]),
        ([{"ss_steps": "9" * 400}, {"ss_steps": "1"}], ["p/first", "p/second"]),
    ],
)
def test_an_unclear_order_is_refused_until_the_steps_are_given(headers: list[dict[str, str]], names: list[str]) -> None:
    with pytest.raises(lm.errors.MergeError, match=r"order of the checkpoints is unclear.*--steps"):
        timeline(headers, names)

    assert timeline(headers, names, [5, 6]).numbers == (5, 6)


@pytest.mark.parametrize("steps", [[5], [5, 5], [0, 5], [-1, 5], [5, 6, 7]])
def test_steps_that_can_not_be_are_refused(steps: list[int]) -> None:
    with pytest.raises(lm.errors.OptionError, match="one positive whole number for each"):
        lm.average(trained(2), ema="sigma=0.1", steps=steps)


@pytest.mark.parametrize(
    "ema", ["0.1", "sigma=0", "sigma=1e-200", "sigma=0.3", "sigma=nan", "beta=1", "beta=-0.5", "gamma=7", "sigma=x", ""]
)
def test_an_ema_that_can_not_be_is_refused(ema: str) -> None:
    with pytest.raises(lm.errors.OptionError, match=r"sigma=NUMBER.*beta=NUMBER"):
        lm.average(trained(2), ema=ema)


def test_loras_that_are_not_of_one_run_are_refused() -> None:
    a, b = small(rank=4), small(rank=8, seed=1)
    for others in ([a, b], [a, a.exclude("text_encoder")], [a]):
        with pytest.raises(lm.errors.LoRAMergeError, match=r"one run|at least two"):
            lm.average(others)


def test_an_earlier_average_or_a_file_given_twice_does_not_count(files: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loramerge", "average"]
    first = tmp_path / "first.safetensors"
    subprocess.run([*command, *files, "-o", first], check=True, capture_output=True)

    again = subprocess.run([*command, *files, first, "-o", first], capture_output=True, text=True)
    twice = subprocess.run([*command, *files, files[0], "-o", first], capture_output=True, text=True)

    assert again.returncode == 1
    assert f"isn't a checkpoint: it was itself merged from {files[0].name.removesuffix('.safetensors')}" in again.stderr
    assert twice.returncode == 1
    assert "is given twice" in twice.stderr


def test_a_decay_that_averages_next_to_nothing_is_said() -> None:
    alone = lm.average(trained(3), ema="beta=0.5").notes
    late = lm.average(trained(8)[5:], ema="sigma=0.2").notes

    assert any("step 120 alone has" in note or "number 120 alone has" in note for note in alone)
    assert any("stands for all before it" in note for note in late)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loramerge", "average", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    loras = [small(seed=seed, alpha=2.0) for seed in range(3)]
    headed = [replace(lora, metadata={"ss_steps": f"{500 * i}"}) for i, lora in enumerate(loras, start=1)]
    return [lm.save(lora, tmp_path / f"{i}.safetensors") for i, lora in enumerate(headed)]


def test_the_command_writes_what_the_library_averages(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "average.safetensors"

    result = run(*files, "-o", out, "--ema", "sigma=0.2")

    assert result.returncode == 0, result.stderr
    assert "EMA of σ_rel 0.2" in result.stdout
    assert "step 500 to 1500" in result.stdout
    assert "relative error" in result.stdout
    wanted, found = lm.average(files, ema="sigma=0.2"), lm.load(out)
    for module in wanted:
        assert relative_error(found[module].delta(), wanted[module].delta()) <= 1e-6


def test_the_file_can_be_made_again_by_its_recipe(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "average.safetensors"
    run(*files, "-o", out, "--ema", "beta=0.999", "-q")

    recipe = lm.Recipe.of(lm.load(out))
    again = replace(recipe, folder=str(tmp_path)).run(tmp_path / "again.safetensors")

    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ema", "0.1"], "sigma=NUMBER"),
        (["--steps", "1,x"], "Can't read the steps"),
        (["--steps", "1,2,3"], "Steps are for an EMA"),
    ],
)
def test_what_is_wrong_is_one_readable_error(
    arguments: list[str], message: str, files: list[Path], tmp_path: Path
) -> None:
    result = run(*files, "-o", tmp_path / "average.safetensors", *arguments)

    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_rank_or_a_budget_chooses_another_rank() -> None:
    run = [random_lora("sd15", rank=4, seed=seed) for seed in range(3)]

    assert lm.average(run).summary("rank") == "rank 4"
    assert lm.average(run, rank=2).summary("rank") == "rank 2"
    assert lm.average(run, rank="sum").summary("rank") == "rank 12"
    assert lm.average(run, max_error="20%").norm() > lm.average(run).norm()


@pytest.mark.parametrize("zero", [0, 0.0, "0", "0%"])
def test_no_error_at_all_is_the_whole_sum(zero: float | str) -> None:
    run = [small(rank=2, seed=seed) for seed in range(2)]

    found = lm.average(run, max_error=zero)

    assert found.summary("rank") == "rank 4"
    for module in found:
        assert relative_error(found[module].delta(), weighted_sum(run, [0.5, 0.5], module)) <= 1e-6


def test_a_rank_of_0_is_refused() -> None:
    with pytest.raises(lm.errors.OptionError, match="The rank 0 is neither"):
        lm.average([small(seed=seed) for seed in range(2)], rank=0)


def of_run(**metadata: str) -> list[LoRA]:
    """Two LoRAs whose headers have these entries, the second with ``other`` behind each."""
    return [
        replace(small(seed=seed), metadata={key: f"{value}{end}" for key, value in metadata.items()})
        for seed, end in enumerate(("", " other"))
    ]


@pytest.mark.parametrize(
    "key",
    ["ss_session_id", "ss_output_name", "name", "ss_seed", "ss_sd_model_hash", "ss_tag_frequency", "modelspec.title"],
)
def test_checkpoints_of_two_runs_are_refused_unless_they_are_allowed(key: str) -> None:
    run = of_run(**{key: "1"})

    with pytest.raises(lm.errors.MergeError, match=rf"one run: {key} .* differ \(1 and 1 other|one run: {key} .*#"):
        lm.average(run)

    assert any(f"taken for one run, though {key}" in note for note in lm.average(run, allow_resumed=True).notes)


def test_two_runs_of_our_own_trainer_are_told_apart_and_its_steps_are_not() -> None:
    def trained_by(seed: int, steps: int) -> LoRA:
        record = {"settings": {"seed": seed, "steps": steps}, "trained_on": {"data": "x"}}
        return replace(small(seed=steps), metadata={"loramerge.training": json.dumps(record)})

    assert lm.average([trained_by(1, 500), trained_by(1, 1000)])
    with pytest.raises(lm.errors.MergeError, match=r"one run: loramerge\.training"):
        lm.average([trained_by(1, 500), trained_by(2, 1000)])


def test_a_title_with_the_step_in_it_is_of_the_same_run() -> None:
    run = [replace(small(seed=seed), metadata={"modelspec.title": f"woody {500 * seed}"}) for seed in (1, 2)]

    assert not any("run" in note for note in lm.average(run).notes)


def test_files_that_do_not_say_their_run_are_noted() -> None:
    assert any("don't say whether they are of one run" in note for note in lm.average(trained(2)).notes)


def test_python_refuses_a_checkpoint_that_is_given_twice_too(files: list[Path], tmp_path: Path) -> None:
    lora = lm.load(files[0])
    link = tmp_path / "link.safetensors"
    link.symlink_to(files[0])

    for twice in ([files[0], str(files[0])], [files[0], link], [lora, lora]):
        with pytest.raises(lm.errors.OptionError, match="is given twice"):
            lm.average(twice)


def test_steps_in_another_order_than_the_files_say_are_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(lm.errors.OptionError, match=r"2 is given as step 500 and .*by ss_steps they are 1500 and"):
        lm.average(files, ema="sigma=0.1", steps=[1500, 1000, 500])

    result = run(*files, "-o", tmp_path / "a.safetensors", "--ema", "sigma=0.1", "--steps", "1,2,3")

    assert result.returncode == 0
    assert "the steps given differ from ss_steps" in result.stdout


def test_a_dry_run_needs_no_output_and_reads_each_header_once(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    before = SafetensorsFile.__init__

    def counted(self: SafetensorsFile, path: str, *rest: object) -> None:
        opened.append(str(path))
        before(self, path, *rest)

    monkeypatch.setattr(SafetensorsFile, "__init__", counted)

    result = CliRunner().invoke(app, ["average", *map(str, files), "--dry-run"])

    assert result.exit_code == 0, result.output
    assert sorted(opened) == sorted(map(str, files))
    assert "3 checkpoints" in result.output
