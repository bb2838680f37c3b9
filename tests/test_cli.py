"""The command line, as a user runs it."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import loramerge as lm
from loramerge.cli.app import VERBS, app
from loramerge.cli.options import workers_or_cores
from loramerge.cli.output import bar, table
from loramerge.errors import size
from loramerge.files.lora import LoRA
from loramerge.layers import Norm
from loramerge.merging.methods import METHODS
from loramerge.testing import random_lora, relative_error, weighted_sum
from small import MODULES, small


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loramerge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return (
        lm.save(small(seed=1, alpha=2.0), tmp_path / "person.safetensors", dialect="kohya"),
        lm.save(small(seed=2, rank=6), tmp_path / "jersey.safetensors", dialect="diffusers-peft"),
    )


def refused(result: subprocess.CompletedProcess[str], message: str, folder: Path) -> None:
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(folder.glob("*both*"))


def test_two_files_become_one(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("merge", *files, "-o", tmp_path / "both.safetensors", "-w", "0.7", "-w", "-0.5", "-j", "2")

    assert result.returncode == 0, result.stderr
    assert "exact" in result.stdout
    both, parents = lm.load(tmp_path / "both.safetensors"), [lm.load(f) for f in files]
    assert both.dialect == "kohya"
    for module in both:
        assert relative_error(both[module].delta(), weighted_sum(parents, [0.7, -0.5], module)) <= 1e-6


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.weights == "uniform"])
def test_what_is_said_of_the_default_weights_is_true_for_every_method(method: str, tmp_path: Path) -> None:
    loras = [random_lora("sd15", seed=seed, only=lambda name, shape: name in MODULES["sd15"]) for seed in (1, 2)]
    files = [lm.save(lora, tmp_path / f"{i}.safetensors") for i, lora in enumerate(loras)]

    said = CliRunner().invoke(app, ["merge", *map(str, files), "--dry-run", "-m", method]).output
    average, total = (lm.merge(loras, method=method, weights=weights) for weights in (None, "sum"))

    assert "note: no weights were given, so each LoRA" in said
    assert "1/2" in said
    assert "2 times as strong" in said
    for module in average:
        assert relative_error(total[module].delta(), 2 * average[module].delta()) <= 1e-4


def test_a_sum_without_weights_is_what_loading_all_does(files: tuple[Path, Path]) -> None:
    assert "acts at full strength, as if all were loaded" in run("merge", *files, "--dry-run").stdout
    loras = [lm.load(file) for file in files]

    both = lm.merge(loras)

    for module in both:
        assert relative_error(both[module].delta(), weighted_sum(loras, [1, 1], module)) <= 1e-6


def test_a_merge_that_changes_the_first_alone_says_nothing_of_weights(files: tuple[Path, Path]) -> None:
    assert "no weights were given" not in run("merge", *files, "--dry-run", "-m", "subtract").stdout


@pytest.mark.parametrize("asked", [("--rank", "8"), ("--max-error", "0.0000001"), ("--max-size", "1GB")])
def test_a_resize_that_cuts_nothing_says_so(asked: tuple[str, str], files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"

    assert "note: nothing is cut" in run("resize", files[1], "-o", out, *asked).stdout
    assert "note: nothing is cut" not in run("resize", files[1], "-o", out, "--rank", "2").stdout
    assert "note: nothing is cut" not in run("merge", *files, "-o", out).stdout


def test_a_file_that_is_converted_into_its_own_dialect_is_said_to_be_a_copy(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    command = ("convert", files[0], "-o", tmp_path / "out.safetensors", "--to")

    assert "the tensors are those that were read\n" in run(*command, "kohya").stdout
    assert "those that were read, in float16" in run(*command, "kohya", "--dtype", "float16").stdout
    assert "were read" not in run(*command, "comfyui").stdout


def test_every_command_that_replaces_a_file_says_so(files: tuple[Path, Path], tmp_path: Path) -> None:
    out, recipe = tmp_path / "out.safetensors", tmp_path / "recipe.toml"
    merged = ("merge", *files, "-o", out)
    recipe.write_text(f'[output]\npath = "out.safetensors"\n[[loras]]\npath = "{files[0].name}"\n')

    assert "replaced" not in run(*merged, "--dry-run").stderr + run(*merged).stderr + run(*merged, "-q").stderr
    assert "replaced" not in run(*merged, "--dry-run").stderr
    for again in (
        merged,
        ("merge", recipe),
        ("convert", files[0], "-o", out, "--to", "kohya"),
        ("resize", files[0], "-o", out, "--rank", "2"),
    ):
        result = run(*again)
        assert result.returncode == 0, result.stderr
        assert result.stderr == f"replaced {out}\n"
        assert "replaced" not in result.stdout


def test_an_adapter_s_directory_that_is_replaced_is_said(files: tuple[Path, Path], tmp_path: Path) -> None:
    for asked in ("out", "out.safetensors"):
        command = ("convert", files[0], "-o", tmp_path / asked, "--to", "peft")
        run(*command)
        assert run(*command).stderr.count("replaced") == 1


def test_a_merge_takes_weights_by_pattern_a_rank_and_a_dialect(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    result = run(
        "merge",
        *files,
        "-o",
        out,
        "-w",
        "1;text_encoder=0",
        "-w",
        "0.5",
        "--rank",
        "3",
        "--to",
        "comfy",
        "--dtype",
        "fp16",
        "-q",
    )

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    both = lm.load(out)
    assert (both.dialect, both.summary("rank")) == ("comfyui", "rank 3")
    assert {layer.dtype for layer in both.values()} == {"F16"}


def test_a_dry_run_prints_the_plan_and_writes_nothing(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("merge", *files, "--dry-run", "--weights", "l2", "--rank", "max")

    assert result.returncode == 0
    assert "4 modules of sdxl" in result.stdout
    assert "(4 of them in every file), rank 6" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jersey.safetensors", "person.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-w", "1"], "Weights given: 1, LoRAs: 2. One weight per LoRA: -w 0.7 -w 0.5."),
        (["-w", "one", "-w", "1"], "Can't read the weight 'one'"),
        (["--weights", "l3"], "Unknown weights 'l3'"),
        (["--rank", "some"], "The rank 'some'"),
        (["--rank", "0"], "The rank 0"),
        (["--method", "tise"], "Unknown merge method 'tise'"),
        (["-O", "density=1"], "has no option 'density'. Methods that have it: ties, dare"),
        (["--max-error", "10"], "--max-error is a share in [0, 1), got '10'. Did you mean 10%?"),
        (["--max-size", "2"], "--max-size 2: can't be met"),
        (["--to", "koyha"], "Did you mean 'kohya'?"),
        (["--to", "xlabs"], "is read, not written"),
        (["--dtype", "int4"], "Unknown dtype 'int4'"),
        (["--exclude", "vae*"], "No module matches the pattern vae*"),
        (["missing.safetensors"], "No such file or directory: missing.safetensors"),
        (["max_error=5%_rank=4.safetensors"], "No such file or directory: max_error=5%_rank=4.safetensors"),
        (["no/energy=0.9.safetensors"], "No such file or directory: no/energy=0.9.safetensors"),
    ],
)
def test_a_wrong_merge_is_one_readable_error(
    arguments: list[str], message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    refused(run("merge", *files, "-o", tmp_path / "both.safetensors", *arguments), message, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        (["inspect", "old.pt"], "(--allow-pickle)"),
        (["check", "old.pt", "--for", "comfyui"], "(--allow-pickle)"),
        (["push", "old.pt", "me/old", "--dry-run"], "(loramerge convert … --allow-pickle)"),
    ],
)
def test_the_way_out_is_an_option_that_the_command_has_or_that_of_a_conversion(
    arguments: list[str], way_out: str, tmp_path: Path
) -> None:
    (tmp_path / "old.pt").touch()

    result = run(*arguments, cwd=tmp_path)

    assert (result.returncode, way_out in result.stderr) == (1, True), result.stderr


@pytest.mark.parametrize("tolerance", ["-1", "nan"])
def test_a_tolerance_is_a_number_from_0(tolerance: str, files: tuple[Path, Path]) -> None:
    assert run("diff", files[0], files[0], "--tolerance", tolerance).returncode == 2


@pytest.mark.parametrize("other", ["--json", "--norms"])
def test_a_recipe_is_asked_for_alone(other: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    assert run("merge", *files, "-o", tmp_path / "merged.safetensors").returncode == 0

    refused(run("inspect", tmp_path / "merged.safetensors", "--recipe", other), "Give --recipe alone", tmp_path)


def test_an_output_is_asked_for(files: tuple[Path, Path], tmp_path: Path) -> None:
    refused(run("merge", *files), "Give --output FILE", tmp_path)


@pytest.mark.parametrize("target", ["nowhere/both.safetensors", "both.ckpt"])
def test_an_output_that_cant_be_is_refused(target: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    refused(run("merge", *files, "-o", tmp_path / target), "Can't write", tmp_path)


def test_values_that_are_not_finite_give_no_output(files: tuple[Path, Path], tmp_path: Path) -> None:
    data = bytearray(files[0].read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    files[0].write_bytes(data)

    refused(run("merge", *files, "-o", tmp_path / "both.safetensors"), "NaN or infinite", tmp_path)


def test_a_conversion_is_the_same_lora(files: tuple[Path, Path], tmp_path: Path) -> None:
    converted = tmp_path / "person-diffusers.safetensors"

    assert run("convert", files[0], "-o", converted, "--to", "diffusers").returncode == 0

    same = run("diff", files[0], converted)
    assert same.returncode == 0
    assert "The same LoRA" in same.stdout


def test_different_loras_differ(files: tuple[Path, Path]) -> None:
    result = run("diff", *files)

    assert result.returncode == 1
    assert "Not the same LoRA" in result.stdout


def test_a_pickle_is_refused_until_it_is_asked_for(tmp_path: Path) -> None:
    import torch

    torch.save(small().state_dict("kohya"), tmp_path / "lora.pt")
    out = tmp_path / "both.safetensors"

    refused(run("convert", tmp_path / "lora.pt", "-o", out, "--to", "diffusers"), "loader (--allow-pickle)", tmp_path)
    assert run("convert", tmp_path / "lora.pt", "-o", out, "--to", "diffusers", "--allow-pickle").returncode == 0


def test_inspect_says_what_a_file_is(files: tuple[Path, Path]) -> None:
    text = run("inspect", files[0]).stdout

    for words in ("Stable Diffusion XL (sdxl)", "kohya", "4: lora", "IN01", "BASE"):
        assert words in text


def test_inspect_draws_norms_and_gives_json(files: tuple[Path, Path]) -> None:
    assert "█" in run("inspect", files[0], "--norms").stdout

    data = json.loads(run("inspect", files[0], "--json", "--norms").stdout)

    lora = lm.load(files[0])
    assert data["dialect"] == "kohya"
    assert {module: entry["rank"] for module, entry in data["modules"].items()} == dict.fromkeys(MODULES["sdxl"], 4)
    for module, entry in data["modules"].items():
        assert entry["alpha"] == 2.0
        assert entry["norm"] == pytest.approx(np.linalg.norm(lora[module].delta()), rel=1e-5)


def test_inspect_reads_no_tensor_and_imports_no_numpy(files: tuple[Path, Path]) -> None:
    code = (
        "import sys; sys.argv = ['loramerge', 'inspect', sys.argv[1]]; from loramerge.cli import main; main();"
        "assert not {'numpy', 'torch', 'typer', 'rich'} & set(sys.modules);"
        "assert not {'loramerge.linalg', 'loramerge.layers.lokr', 'loramerge.files.architectures.wan'} & set(sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code, files[0]], capture_output=True, check=False).returncode == 0


def test_importing_and_merging_need_no_torch(files: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys, loramerge as lm; assert not {'numpy', 'torch'} & set(sys.modules);"
        "lm.save(lm.merge(sys.argv[1:3]), sys.argv[3], dtype='float16');"
        "assert not {'torch', 'diffusers', 'peft', 'transformers'} & set(sys.modules)"
    )
    arguments = [*files, tmp_path / "both.safetensors"]

    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", VERBS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    text = run(command, "--help").stdout

    assert f"Example: loramerge {command}" in " ".join(text.split())


def test_lists_are_complete() -> None:
    from loramerge.files.dialects import DIALECTS
    from loramerge.merging.methods import METHODS

    assert [d["name"] for d in json.loads(run("dialects", "--json").stdout)] == list(DIALECTS)
    assert [m["name"] for m in json.loads(run("methods", "--json").stdout)] == list(METHODS)


def test_methods_are_listed_with_their_options_as_they_are_typed() -> None:
    from loramerge.merging.methods import METHODS

    lines = [line.strip() for line in run("methods").stdout.splitlines()]
    typed = [line.split("  ")[0] for line in lines if line.startswith("-O ")]

    assert typed == [f"-O {o.name}={o.default}" for m in METHODS.values() for o in m.options.values()]
    assert "-O density=0.2  a number in (0, 1]" in lines


def test_an_interrupt_is_no_traceback(files: tuple[Path, Path], tmp_path: Path) -> None:
    import signal

    out = tmp_path / "both.safetensors"
    code = (
        "import sys, os, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import loramerge.merging.running as m; original = m.Merger.outcome;"
        "m.Merger.outcome = lambda self, module: (os.kill(os.getpid(), signal.SIGINT), original(self, module))[1];"
        "from loramerge.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "merge", *files, "-o", out], capture_output=True, text=True, check=False
    )

    assert result.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["jersey.safetensors", "person.safetensors"]


def test_tables_and_bars_are_plain_text() -> None:
    assert table(["a", "number"], [["x", "1"], ["yy", "22"]]).splitlines()[2:] == ["x        1", "yy      22"]
    assert bar(1.0, 2.0, width=4) == "██"
    assert bar(0.0, 0.0) == ""
    assert [size(n) for n in (12, 1500, 2_500_000, 3_200_000_000)] == ["12 B", "1.5 kB", "2.5 MB", "3.20 GB"]


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    lora = small(kind="dora")
    part = small(modules=MODULES["sdxl"][:1])
    mixed = lm.save(dataclasses.replace(lora, layouts={**lora.layouts, **part.layouts}), tmp_path / "m.safetensors")

    result = run("convert", mixed, "-o", tmp_path / "d.safetensors", "--to", "diffusers", "--allow-lossy")

    assert result.returncode == 0
    assert result.stdout.count("left out:") == 1
    assert "and 2 more: diffusers can't hold this layer" in result.stdout
    assert set(lm.load(tmp_path / "d.safetensors")) == set(part)


@pytest.mark.parametrize("cut", [(), ("--max-size", "60kB")])
@pytest.mark.parametrize("verb", ["merge", "average", "resize"])
def test_every_merge_leaves_out_what_a_dialect_cannot_hold_if_it_may(
    verb: str, cut: tuple[str, ...], tmp_path: Path
) -> None:
    files = [lm.save(with_norm(seed), tmp_path / f"run-{seed}.safetensors") for seed in (1, 2)]
    given, out = files[:1] if verb == "resize" else files, tmp_path / "both.safetensors"
    options = ["-o", out, "--to", "diffusers", "--allow-lossy", *(cut or ("--rank", "2"))]

    result = CliRunner().invoke(app, [verb, *map(str, [*given, *options])], catch_exceptions=False)

    assert f"left out: {NORM}" in result.output
    assert set(lm.load(out)) == set(MODULES["sdxl"])
    assert out.stat().st_size <= 60_000 or not cut


NORM = "unet.conv_norm_out"


def with_norm(seed: int) -> LoRA:
    lora = small(seed=seed)
    norm = Norm(w_norm=np.ones(320, np.float32), b_norm=np.ones(320, np.float32))
    return dataclasses.replace(lora, layouts={**lora.layouts, NORM: norm})


def test_nothing_is_not_written(tmp_path: Path) -> None:
    path = lm.save(small(kind="full"), tmp_path / "full.safetensors")

    refused(
        run("convert", path, "-o", tmp_path / "both.safetensors", "--to", "diffusers", "--allow-lossy"),
        "nothing is left",
        tmp_path,
    )


def test_modules_can_be_left_out_of_a_conversion(files: tuple[Path, Path], tmp_path: Path) -> None:
    run("convert", files[0], "-o", tmp_path / "d.safetensors", "--to", "diffusers", "--exclude", "text_encoder*")

    assert set(lm.load(tmp_path / "d.safetensors")) == set(MODULES["sdxl"][:3])


def test_dora_files_compare(tmp_path: Path) -> None:
    a = lm.save(small(kind="dora"), tmp_path / "a.safetensors")
    b = lm.save(small(kind="dora"), tmp_path / "b", dialect="peft")
    c = lm.save(small(kind="dora", seed=4), tmp_path / "c.safetensors")

    assert run("diff", a, b).returncode == 0
    assert run("diff", a, c).returncode == 1


@pytest.mark.parametrize("options", [(), ("--rank", "max")])
def test_a_resize_asks_how_small(options: tuple[str, ...], files: tuple[Path, Path], tmp_path: Path) -> None:
    refused(run("resize", files[0], "-o", tmp_path / "small.safetensors", *options), "How small? Give --rank", tmp_path)


def test_a_device_that_is_not_there_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    refused(run("merge", *files, "-o", tmp_path / "both.safetensors", "--device", "gpu9"), "device 'gpu9'", tmp_path)


def test_weights_given_together_are_explained(files: tuple[Path, Path], tmp_path: Path) -> None:
    refused(run("merge", *files, "-o", tmp_path / "both.safetensors", "-w", "1", "0.5"), "one by one", tmp_path)


def test_a_merge_takes_the_cores_that_it_may_use_but_not_all_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    few = workers_or_cores(None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))

    assert (few, workers_or_cores(None), workers_or_cores(7)) == (2, 4, 7)
    assert [workers_or_cores(None, widest=4 * rows * 3072) for rows in (3072, 21504)] == [4, 1]
    assert workers_or_cores(7, widest=4 * 21504 * 3072) == 7


def test_the_largest_delta_that_is_formed_is_known() -> None:
    loras = [small(seed=1), small(seed=2)]
    shapes = [loras[0].layout(module).shape for module in loras[0]]

    formed = [lm.plan(loras, method=method, rank=2).widest for method in ("linear", "ties")]

    assert formed == [0, 4 * max(map(math.prod, shapes))]


def test_what_was_kept_is_told_for_any_number_of_workers(files: tuple[Path, Path], tmp_path: Path) -> None:
    said = [
        run("merge", *files, "-o", str(tmp_path / f"out{n}.safetensors"), "-r", "2", "-j", str(n)).stdout
        for n in (1, 2)
    ]

    assert "kept" in said[0]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]


def test_an_input_is_not_written_over(files: tuple[Path, Path], tmp_path: Path) -> None:
    before = files[0].read_bytes()

    result = run("merge", *files, "-o", files[0])

    refused(result, "is one of the LoRAs that are merged", tmp_path)
    assert files[0].read_bytes() == before


def test_the_plan_says_what_the_file_will_weigh(files: tuple[Path, Path], tmp_path: Path) -> None:
    said = run("merge", *files, "-o", tmp_path / "both.safetensors", "--advice").stdout

    written = (tmp_path / "both.safetensors").stat().st_size
    assert said.count(f"{written / 1000:.1f} kB") == 2
    assert "These two" in said


@pytest.mark.parametrize("command", ["inspect", "compare", "diff"])
def test_a_recipe_in_the_place_of_a_lora_says_what_runs_it(
    command: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(f"[[loras]]\npath = '{files[0].name}'\n")

    result = run(command, tmp_path / "recipe.toml", *files[: command != "inspect"])

    assert result.returncode == 1
    assert f"recipe.toml is a recipe, not a LoRA. Ways out: 'loramerge merge {tmp_path / 'recipe.toml'}'" in (
        result.stderr.replace("\n", " ")
    )


def test_a_resize_leaves_modules_out_and_takes_a_base(tmp_path: Path) -> None:
    module, other = MODULES["sdxl"][:2]
    weight = np.random.default_rng(0).standard_normal((640, 640), dtype=np.float32)
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    save_file({key: weight}, tmp_path / "base.safetensors")
    dora = small(modules=(module,), kind="dora", seed=1)
    lora = dataclasses.replace(dora, layouts={**dora.layouts, other: small(modules=(other,), seed=1)[other]})
    lm.save(lora, tmp_path / "dora.safetensors", dialect="kohya")

    result = run(
        "resize", tmp_path / "dora.safetensors", "-o", tmp_path / "out.safetensors", "--rank", "4",
        "--exclude", other, "--base", tmp_path / "base.safetensors",
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    found = lm.load(tmp_path / "out.safetensors")
    assert set(found) == {module}
    delta = np.float64(dora[module].delta_on(weight))
    lost = np.linalg.norm(found[module].delta() - delta)
    assert lost <= 1.01 * np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[4:])


def test_a_comparison_leaves_modules_out(files: tuple[Path, Path]) -> None:
    found = json.loads(run("compare", *files, "--json", "--exclude", "text_encoder*").stdout)

    assert {row["name"].partition(".")[0] for row in found["modules"]} == {"unet"}
    assert "No module matches the pattern nothing" in run("compare", *files, "--exclude", "nothing").stderr


def test_of_an_unknown_family_few_rows_are_shown(tmp_path: Path) -> None:
    keys = {
        f"lora_unet_strange_{i}_to_q.lora_{side}.weight": np.ones((2, 2), np.float32)
        for i in range(23)
        for side in ("up", "down")
    }
    save_file(keys, tmp_path / "strange.safetensors")

    text = run("inspect", tmp_path / "strange.safetensors").stdout

    assert "of no model family that loramerge knows" in text
    rows = [line.split()[:2] for line in text.splitlines() if line.startswith("transformer ")]
    assert rows == [["transformer", f"strange.{i}"] for i in range(20)]
    assert "… and 3 more" in text


def test_a_link_that_leads_nowhere_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to("gone.safetensors")

    refused(run("inspect", tmp_path / "link.safetensors"), "is a link to gone.safetensors, which isn't there", tmp_path)


def test_a_conversion_is_not_written_over_what_it_reads(files: tuple[Path, Path], tmp_path: Path) -> None:
    before = files[0].read_bytes()
    (tmp_path / "link.safetensors").symlink_to(files[0])

    result = run("convert", files[0], "-o", tmp_path / "link.safetensors", "--to", "diffusers")

    refused(result, "is the LoRA that is read", tmp_path)
    assert files[0].read_bytes() == before


@pytest.mark.parametrize(
    ("read", "written", "to"),
    [("p/adapter_model.safetensors", "p", "peft"), ("p", "p/adapter_model.safetensors", "kohya")],
)
def test_a_conversion_is_not_written_over_a_part_of_what_it_reads(
    read: str, written: str, to: str, tmp_path: Path
) -> None:
    before = lm.load(lm.save(small(), tmp_path / "p", dialect="peft")).sha256

    result = run("convert", tmp_path / read, "-o", tmp_path / written, "--to", to)

    refused(result, "is the LoRA that is read", tmp_path)
    assert lm.load(tmp_path / "p").sha256 == before


def test_loras_without_a_module_in_common_are_told_apart_in_a_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    other = lm.save(small("sd15", MODULES["sd15"][:2]), tmp_path / "other.safetensors", dialect="kohya")

    result = run("diff", files[0], other)

    assert result.returncode == 1
    assert result.stdout.count("\n") == 1
    assert "for different models (sdxl, sd15): no module in common" in result.stdout


def test_a_tools_own_name_is_written_as_the_dialect_it_means(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = run(
        "convert", files[1], "-o", tmp_path / "a.safetensors", "--dialect", "AUTO1111", "--architecture", "sdxl"
    )

    assert "(kohya, " in result.stdout
    assert lm.open(tmp_path / "a.safetensors").dialect == "kohya"


def test_a_directory_in_the_place_of_a_file_is_said(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("convert", files[0], "-o", tmp_path / "a.safetensors", "--to", "PEFT")

    assert "note: PEFT's layout is a directory: a, not a.safetensors" in result.stdout


def test_a_conversion_tells_its_size_before_it_writes(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"

    result = run("convert", files[0], "-o", out, "--to", "comfyui")

    assert f"(comfyui, {size(out.stat().st_size)})" in result.stdout


def test_a_large_file_is_refused_until_its_size_is_chosen(tmp_path: Path) -> None:
    blocks = range(6)
    modules = tuple(f"unet.mid_block.attentions.0.transformer_blocks.{i}.attn1.to_q" for i in blocks)
    lora = lm.save(small(modules=modules, kind="lokr-full"), tmp_path / "lokr.safetensors", dialect="kohya")
    out = tmp_path / "both.safetensors"

    refused(run("convert", lora, "-o", out, "--to", "diffusers"), "(--allow-growth)", tmp_path)
    for arguments in ((), ("--dry-run",)):
        refused(run("merge", lora, lora, "-o", out, *arguments), "(--max-size 200MB)", tmp_path)
    assert run("merge", lora, lora, "-o", out, "--allow-growth", "--dry-run").returncode == 0
    assert run("merge", lora, "-o", out, "-w", "0.5").returncode == 0
    assert out.stat().st_size < 2 * lora.stat().st_size


def test_what_is_not_quite_exact_is_said(tmp_path: Path) -> None:
    files = [
        lm.save(small(rank=8, seed=i), tmp_path / f"{i}.safetensors", dialect="kohya", dtype="bfloat16") for i in (1, 2)
    ]

    result = run("merge", *files, "-o", tmp_path / "both.safetensors")
    cut = run("merge", *files, "-o", tmp_path / "cut.safetensors", "--max-size", "60kB", "--dtype", "float32")

    assert "exact but for the rounding to BF16 (up to about 0.24 %)" in result.stdout
    assert "--dtype float16 has room for twice the rank" in cut.stdout
    assert "more than 30 % of ‖ΔW‖ is lost; a larger --max-size" in cut.stdout
    assert "F32 has more bits than every input" in cut.stdout
    both, parents = lm.load(tmp_path / "both.safetensors"), [lm.load(file) for file in files]
    assert max(relative_error(both[m].delta(), weighted_sum(parents, [1, 1], m)) for m in both) < 2e-3


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_no_lora_is_written_in_float8(dtype: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    for command in (["merge", *files], ["convert", files[0], "--to", "kohya"], ["resize", files[0], "--rank", "2"]):
        result = run(*command, "-o", out, "--dtype", dtype)
        assert result.returncode == 1
        assert "Ways out: float16" in result.stderr
        assert not out.exists()


def test_a_nan_is_named_once_and_its_module_can_be_left_out(files: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = {key: tensor.numpy() for key, tensor in lm.load(files[0]).state_dict("kohya").items()}
    key = next(key for key in tensors if key.endswith("to_q.lora_up.weight"))
    tensors[key][0, 0] = np.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    out = tmp_path / "both.safetensors"

    result = run("merge", tmp_path / "nan.safetensors", files[1], "-o", out)

    assert result.stderr.count("nan.safetensors") == 1
    assert result.stderr.split("Way out")[0].count("to_q") == 1
    pattern = result.stderr.split("--exclude '")[1].split("'")[0]
    assert run("merge", tmp_path / "nan.safetensors", files[1], "-o", out, "--exclude", pattern).returncode == 0


def test_a_checkpoint_in_the_place_of_a_lora_is_sent_to_bake(files: tuple[Path, Path], tmp_path: Path) -> None:
    save_file({"model.diffusion_model.out.2.weight": np.ones((4, 4), np.float32)}, tmp_path / "base.safetensors")

    result = run("merge", files[0], tmp_path / "base.safetensors", "-o", tmp_path / "both.safetensors")

    refused(result, "loramerge bake LORA --base MODEL -o NEW", tmp_path)


def test_a_loha_is_shown_with_its_dim(tmp_path: Path) -> None:
    file = lm.save(small(kind="loha", rank=4), tmp_path / "loha.safetensors", dialect="kohya")

    assert "dim 4, as a LoRA 16" in run("inspect", file).stdout
