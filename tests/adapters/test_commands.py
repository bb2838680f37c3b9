"""``zip`` and ``calibrate`` as a user runs them, on a tiny model that diffusers saved."""

import io
import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import tiny
from commands import done, run
from safetensors.numpy import load_file, save_file
from typer import Exit

import loramerge as lm
from loramerge import LoRA
from loramerge.cli import model_options
from loramerge.cli.calibrate import fit_table
from loramerge.cli.model_options import interruptible, loss_table
from loramerge.errors import LoRAMergeError
from loramerge.learned.least_squares import Report
from loramerge.merging.coefficients import Coefficients
from loramerge.testing import random_lora, relative_error

MINIATURE = Path(__file__).parents[2] / "examples" / "virtual_tryon" / "weights" / "base"
PROMPTED = ("-p", tiny.PROMPTS[0], "-p", tiny.PROMPTS[1], "--sampling-steps", "2", "--trajectories", "1")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    names = ("person", "jersey")
    return [
        lm.save(tiny.lora("sdxl", i, rank=2 + i), tmp_path / f"{name}.safetensors", dialect="diffusers-peft")
        for i, name in enumerate(names)
    ]


def zipped(files: list[Path], base: Path, output: Path, *more: object) -> LoRA:
    done("zip", *files, "-b", base, "-o", output, "--device", "cpu", *more)
    return lm.load(output)


def same(a: LoRA, b: LoRA) -> bool:
    pairs = [zip(a[m].factors(), b[m].factors(), strict=True) for m in a]
    return list(a) == list(b) and all(np.array_equal(x, y) for pair in pairs for x, y in pair)


def test_zip_learns_from_prompts_and_says_how_it_was_made(files: list[Path], base: Path, tmp_path: Path) -> None:
    kept = tmp_path / "c.safetensors"
    quick = ("-s", "steps=2", "-s", "calibration=1")
    merged = zipped(files, base, tmp_path / "z.safetensors", *PROMPTED, *quick, "--coefficients", kept)

    assert merged.summary("rank") == "rank 5"
    recipe = json.loads(merged.metadata["loramerge"])
    assert (recipe["method"], recipe["options"]["steps"], recipe["options"]["seed"]) == ("ziplora", 2, 0)
    assert [(i["name"], i["weight"], i["sha256"]) for i in recipe["inputs"]] == [
        (file.name, "learned", lm.load(file).sha256) for file in files
    ]
    assert recipe["learned_on"]["base"] == base.name
    assert recipe["learned_on"]["data"]["prompts"] == [[prompt] for prompt in tiny.PROMPTS]
    assert recipe["output"] == {"dialect": "diffusers-peft", "dtype": "float32"}
    assert str(tmp_path) not in merged.metadata["loramerge"]
    assert {**Coefficients.read(kept).provenance, "output": recipe["output"]} == recipe

    again = lm.merge(files, weights=str(kept))
    for module in merged:
        assert relative_error(again[module].delta(), merged[module].delta()) < 1e-5


def test_zip_learns_from_images(files: list[Path], base: Path, tmp_path: Path) -> None:
    folders = [tiny.images(tmp_path / str(i), None, seed=i) for i in range(2)]
    data = ("--data", folders[0], "--data", folders[1], "-p", tiny.PROMPTS[0], "-p", tiny.PROMPTS[1])
    quick = ("-s", "steps=2", "-s", "init=ones", "-s", "calibration=1", "-s", "parametrisation=down")
    merged = zipped(
        files, base, tmp_path / "z.safetensors", *data, *quick, "--snr-gamma", "5", "--gradient-checkpointing"
    )

    recipe = json.loads(merged.metadata["loramerge"])
    places = recipe["learned_on"]["data"]["images"]
    assert [place["count"] for place in places] == [2, 2]
    assert len({place["sha256"] for place in places}) == 2
    assert not same(merged, lm.load(lm.save(lm.merge(files, weights=[1, 1]), tmp_path / "sum.safetensors")))


def test_zip_goes_on_from_its_checkpoint_to_the_same_bits(files: list[Path], base: Path, tmp_path: Path) -> None:
    def learned(name: str, steps: int, *more: object) -> LoRA:
        chosen = ("-s", f"steps={steps}", "-s", "calibration=1", "--every", "2", *PROMPTED)
        return zipped(files, base, tmp_path / name, *chosen, *more)

    whole = learned("whole.safetensors", 4)
    state = ("--checkpoint", tmp_path / "state.safetensors")
    half = learned("half.safetensors", 2, *state)
    rest = learned("rest.safetensors", 4, *state)

    assert same(rest, whole)
    assert not same(half, whole)
    with pytest.raises(LoRAMergeError, match=r"of another run, with other data\."):
        learned("other.safetensors", 5, *state, "--guidance", "2")


def test_a_state_of_another_base_of_the_same_name_is_refused(files: list[Path], base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "elsewhere" / base.name)
    (weights,) = (other / "unet").glob("*.safetensors")
    save_file({name: 2 * values for name, values in load_file(weights).items()}, weights)
    data = [("--data", tiny.images(tmp_path / str(i), None, seed=i)) for i in range(2)]
    quick = ("-s", "steps=0", "-s", "init=ones", "-s", "loss=mse", "--checkpoint", tmp_path / "state.safetensors")
    given = (*data[0], *data[1], *PROMPTED[:4], *quick)
    zipped(files, base, tmp_path / "z.safetensors", *given)

    with pytest.raises(LoRAMergeError, match=r"of another run, with other fingerprint\."):
        zipped(files, other, tmp_path / "z.safetensors", *given)


def test_loras_that_change_nothing_have_no_table() -> None:
    assert "change nothing in the modules that were looked at" in fit_table(Report(), None)


def test_calibrate_keeps_moments_for_another_granularity(files: list[Path], base: Path, tmp_path: Path) -> None:
    kept, first, second = (tmp_path / f"{name}.safetensors" for name in ("moments", "core", "column"))
    shared = (*files, "--moments", kept, "--device", "cpu")
    output = done("calibrate", *shared, "-b", base, *PROMPTED, "-g", "column", "-o", second, "--batches", "2")
    done("calibrate", *shared, "-g", "core", "-o", first)

    assert "of the average" in output
    recipes = [json.loads(lm.load(path).metadata["loramerge"]) for path in (first, second)]
    assert [recipe["options"]["granularity"] for recipe in recipes] == ["core", "column"]
    assert recipes[0]["learned_on"] == recipes[1]["learned_on"]
    assert recipes[0]["learned_on"]["calibration"] == {"batches": 2, "batch_size": 1, "seed": 0}
    assert not same(lm.load(first), lm.load(second))
    done("calibrate", *shared, "-b", base, *PROMPTED, "-g", "column", "-o", second, "--batches", "2")
    with pytest.raises(LoRAMergeError, match=r"were taken with other calibration and trajectories\. Ways out"):
        done("calibrate", *shared, "-b", base, *PROMPTED[:-1], "3", "-o", second)
    with pytest.raises(LoRAMergeError, match=r"were taken with other base\. Ways out"):
        done("calibrate", *shared, "-b", tmp_path, *PROMPTED, "-o", second, "--batches", "2")
    with pytest.raises(LoRAMergeError, match=r"were taken with other precision\. Ways out"):
        done("calibrate", *shared, "-b", base, *PROMPTED, "-o", second, "--batches", "2", "--precision", "bf16")
    done("calibrate", *shared, "-b", base, *PROMPTED, "-o", second, "--batches", "2", "--precision", "fp32")
    with pytest.raises(LoRAMergeError, match="stand in another order"):
        done("calibrate", *reversed(files), "--moments", kept, "-o", first)


@pytest.mark.parametrize(("command", "quick"), [("zip", ("-s", "steps=1")), ("calibrate", ("--batches", "1"))])
def test_a_learned_merge_names_the_command_that_made_it(
    command: str, quick: tuple[str, ...], files: list[Path], base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged.safetensors"
    done(command, *files, "-b", base, "-o", output, "--device", "cpu", *PROMPTED, *quick)

    assert "person.safetensors × learned, jersey.safetensors × learned by" in done("inspect", output)
    with pytest.raises(LoRAMergeError, match=f"learned on a model, by 'loramerge {command}'"):
        done("inspect", output, "--recipe")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "Give one --prompt per file"),
        (("-p", "a person"), "--prompt given: 1, LoRAs: 2"),
        ((*PROMPTED, "-s", "steps"), "wanted NAME=VALUE"),
        ((*PROMPTED, "-s", "steps=many"), "steps is a whole number, got 'many'"),
        ((*PROMPTED, "-s", "pace=3"), "Unknown setting 'pace'"),
        ((*PROMPTED, "-s", "init=zeros"), "init must be one of lsq, ones, mean, got 'zeros'"),
        ((*PROMPTED, "--preset", "best"), "Unknown preset 'best'"),
        ((*PROMPTED, "-w", "1"), "Weights given: 1, LoRAs: 2"),
        (("-p", "a person"), r"several prompts of one file stand with \| between"),
        ((*PROMPTED, "--snr-gamma", "0"), "above 0, got 0"),
        (("--data", "nowhere", "--data", "nowhere"), "nowhere"),
        ((*PROMPTED, "--precision", "fp16"), "Way out: --precision bf16"),
    ],
)
def test_mistakes_are_told_before_the_model_is_read(
    more: tuple[Any, ...], message: str, files: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(LoRAMergeError, match=message):
        done("zip", *files, "-b", tmp_path / "nowhere", "-o", tmp_path / "z.safetensors", *more)
    assert not (tmp_path / "z.safetensors").exists()


def test_prompts_without_the_trigger_are_only_hinted_at(files: list[Path], base: Path, tmp_path: Path) -> None:
    lora = lm.load(files[0])
    said = replace(lora, metadata={**lora.metadata, "modelspec.trigger_phrase": "psq-person"})
    shared = (lm.save(said, tmp_path / "said.safetensors"), files[1], "-b", base, "-o", tmp_path / "z.safetensors")
    quick = ("--device", "cpu", "-s", "steps=0", "-s", "init=ones", "-s", "loss=mse", *PROMPTED[4:])
    hint = "Hint: said.safetensors says that its trigger is 'psq-person'"

    assert hint in done("zip", *shared, *quick, "-p", "a person", "-p", "a jersey")
    assert hint not in done("zip", *shared, *quick, *PROMPTED[:4])


def test_one_who_interrupts_learning_is_told_of_the_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state.safetensors"
    state.touch()

    with pytest.raises(Exit) as stopped, interruptible(state):
        raise KeyboardInterrupt

    assert stopped.value.exit_code == 130
    assert f"The state is in {state}; the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("phrase", ["psq-person", "someone, psq-person", "psq-person,"])
def test_a_trigger_is_found_among_several(phrase: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = random_lora("sd15", rank=1, only=lambda module, shape: module.endswith("mid_block.attentions.0.proj_in"))
    lora = replace(small, metadata={"modelspec.trigger_phrase": phrase})

    model_options._hint([lora], [["psq-person on a beach"]])
    assert not capsys.readouterr().err
    model_options._hint([lora], [["a person on a beach"]])
    assert f"its trigger is {phrase!r}" in capsys.readouterr().err


def test_coefficients_are_shown_by_block(tmp_path: Path) -> None:
    both = [tiny.lora("sdxl", 1), tiny.lora("sdxl", 2)]
    columns = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": np.array(
            [[1.0] * 8, [0.0] * 4 + [1.0] * 4], "f4"
        ),
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": np.full((2, 8), 0.5, "f4"),
    }
    path = Coefficients.of(columns, both, [1, 1]).save(tmp_path / "c.safetensors")
    output = done("coefficients", path, "--plot", tmp_path / "c.svg").splitlines()

    cells = [line.split() for line in output[2:6]]
    assert [row[0:2] for row in (cells[0], cells[2])] == [["unet", "IN04"], ["unet", "MID"]]
    assert cells[3] == ["lora", "2", "8", "0.000", "0.500", "1.000", "█", "█"]
    assert cells[0][-4:-1] == ["0.500", "0.500", "0.500"]
    assert "<!-- unet IN04 -->" in (tmp_path / "c.svg").read_text()
    with pytest.raises(LoRAMergeError, match=r"ends in \.png, \.svg, \.pdf"):
        done("coefficients", path, "--plot", tmp_path / "c.txt")


def test_running_out_of_memory_says_what_to_lower() -> None:
    import torch

    from loramerge.diffusion import within_memory
    from loramerge.errors import DeviceMemoryError

    advice = r"2 LoRAs × 4 examples at 1024.*checkpointing.*bf16.*batch.*resolution"
    with pytest.raises(DeviceMemoryError, match=advice), within_memory(1024, 4, 2):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(DeviceMemoryError, match="can't allocate memory"), within_memory(1024, 4, 2):
        torch.empty(2**60)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loramerge.diffusion import load

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(LoRAMergeError, match=r"pip install 'loramerge\[diffusers\]'"):
        load(tmp_path)


@pytest.fixture
def own_code(base: Path, tmp_path: Path) -> Path:
    """A model whose VAE is of a class that lies beside its weights, and that says so when it is run."""
    folder = tmp_path / "own"
    shutil.copytree(base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "vae": ["own_vae", "OwnVAE"]}))
    (folder / "vae" / "own_vae.py").write_text(
        "from pathlib import Path\n\nfrom diffusers import AutoencoderKL\n\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n\n\nclass OwnVAE(AutoencoderKL):\n    pass\n"
    )
    return folder


QUICK = ("--device", "cpu", "-s", "steps=0", "-s", "init=ones", "-s", "loss=mse", *PROMPTED)


def test_code_of_the_models_own_runs_only_when_it_is_trusted(files: list[Path], own_code: Path, tmp_path: Path) -> None:
    asked = ("zip", *files, "-b", own_code, "-o", tmp_path / "z.safetensors", *QUICK)
    drawing = ("generate", "-b", own_code, "-o", tmp_path / "out", "-p", "a person", "-n", "1", "--steps", "1")

    for command in (asked, (*drawing, "--device", "cpu")):
        with pytest.raises(
            LoRAMergeError, match=r"own \(vae/own_vae\.py\): look at it, then --trust-remote-code"
        ) as told:
            done(*command)
        assert "HF_TOKEN" not in str(told.value)
        assert not (tmp_path / "ran").exists()

    done(*asked, "--trust-remote-code")
    assert (tmp_path / "ran").exists()
    assert (tmp_path / "z.safetensors").exists()


def test_loading_leaves_out_what_is_beside_the_point_only() -> None:
    from diffusers.utils import logging as theirs

    from loramerge.diffusion import load
    from loramerge.scoring.quiet import hushed

    said = io.StringIO()
    handler, verbosity = logging.StreamHandler(said), theirs.get_verbosity()
    theirs.get_logger("diffusers").addHandler(handler)
    theirs.set_verbosity_warning()
    try:
        pipelines = theirs.get_logger("diffusers.pipelines")
        load(MINIATURE, device="cpu")
        with hushed():
            pipelines.warning("Some weights were not initialized")
            pipelines.warning("Expected types for vae: …, got a class of the model's own")
        pipelines.warning("Expected types for unet: …, got another")
    finally:
        theirs.set_verbosity(verbosity)
        theirs.get_logger("diffusers").removeHandler(handler)

    weights, types = said.getvalue().splitlines()
    assert weights == "Some weights were not initialized"
    assert types.startswith("Expected types for unet")


@pytest.mark.parametrize("name", ["nowhere/model", "./nowhere"])
def test_a_mistyped_base_is_told_in_one_line(
    name: str, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoRAMergeError, match=f"there is no directory {name}") as told:
        done("zip", *files, "-b", name, "-o", tmp_path / "z.safetensors", *QUICK)

    assert "local_files_only" not in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("command", ["zip", "calibrate", "train", "generate", "score"])
def test_a_device_that_is_not_there_is_told_before_the_model_is_read(
    command: str, files: list[Path], tmp_path: Path
) -> None:
    model = tmp_path / "no model"
    photos = tiny.images(tmp_path / "photos", "a person")
    given: dict[str, tuple[object, ...]] = {
        "zip": (*files, "-b", model, "-o", tmp_path / "z.safetensors", *PROMPTED),
        "calibrate": (*files, "-b", model, "-o", tmp_path / "z.safetensors", *PROMPTED),
        "train": (photos, "-b", model, "-o", tmp_path / "z.safetensors"),
        "generate": ("-b", model, "-o", tmp_path / "out", "-p", "a person"),
        "score": (photos, "-r", photos, "-m", model),
    }
    with pytest.raises(LoRAMergeError, match="Can't compute on the device 'cuda:99'"):
        done(command, *given[command], "--device", "cuda:99")


def test_a_run_that_goes_on_says_from_where(files: list[Path], base: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    shared = ("zip", *files, "-b", base, "-o", tmp_path / "z.safetensors", "--checkpoint", state, *QUICK)

    assert "Going on" not in done(*shared, "-s", "steps=2")
    assert f"Going on from {state} at step 2." in done(*shared, "-s", "steps=4")


@pytest.mark.parametrize(("count", "averaged"), [(1, 1), (4, 2), (20, 5), (400, 40)])
def test_the_losses_shown_are_of_more_than_one_step_where_there_are_more(count: int, averaged: int) -> None:
    assert f"loss, first {averaged}  last {averaged}" in loss_table([("person", [1.0] * count)])


def test_coefficients_that_lie_far_away_are_counted_and_not_drawn(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 100, dtype="f4")
    values[:3] = [-20, 39, 20]
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    loras = [tiny.lora("sdxl", 1), tiny.lora("sdxl", 2)]
    columns = {name: np.stack([values, np.linspace(0, 1, 100, dtype="f4")])}
    output = done("coefficients", Coefficients.of(columns, loras, [1, 1]).save(tmp_path / "c.safetensors"))

    assert "3 of 200 coefficients lie outside the picture, from -20 to 39." in output
    cells = [line.split() for line in output.splitlines()[2:4]]
    for row, mine in zip((cells[0][5:8], cells[1][3:6]), columns[name], strict=True):
        assert row == [f"{value:.3f}" for value in np.quantile(mine, [0.25, 0.5, 0.75])]


def test_a_missing_matplotlib_is_told_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    result = run("coefficients", tmp_path / "c.safetensors", "--plot", tmp_path / "c.svg")
    assert "pip install 'loramerge[plots]'" in str(result.exception)
    assert not result.output
