"""Sizes that a file implies: what is computed without writing it out, and what is refused before memory is taken."""

import json
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

import loramerge as lm
from loramerge.cli.app import app
from loramerge.cli.output import guarded
from loramerge.comparing.diffs import differences
from loramerge.errors import DeviceMemoryError, LayerError, LoRAMergeError, MergeError, OptionError
from loramerge.files.dialects.write import spell
from loramerge.files.lora import LoRA
from loramerge.files.writing import saved_size, tensors_size
from loramerge.layers import LowRank
from loramerge.layers.base import dense_norm
from loramerge.learned.least_squares import column_solution, solve
from loramerge.learned.moments import Moments
from loramerge.merging.baking import bake
from loramerge.merging.recipe import Input, Output, Recipe
from loramerge.testing import random_layer, random_lora, relative_error

P = "lora_unet_m."


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def loha(a: tuple[int, ...], b: tuple[int, ...], core: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    found = {f"{P}hada_w{i}_{end}": normal(*shape) for i in (1, 2) for end, shape in (("a", a), ("b", b))}
    return found | ({f"{P}hada_t{i}": normal(*core) for i in (1, 2)} if core else {})


HOSTILE: dict[str, dict[str, np.ndarray]] = {
    "lokr": {f"{P}lokr_w1": normal(400, 400), f"{P}lokr_w2": normal(400, 400)},
    "lokr, middling": {f"{P}lokr_w1": normal(50, 50), f"{P}lokr_w2": normal(50, 50)},
    "lokr, factored": {
        f"{P}lokr_w1_a": normal(60, 900),
        f"{P}lokr_w1_b": normal(900, 60),
        f"{P}lokr_w2_a": normal(90, 700),
        f"{P}lokr_w2_b": normal(700, 90),
    },
    "lokr, core": {
        f"{P}lokr_w1": normal(2, 2),
        f"{P}lokr_w2_a": normal(1, 3000),
        f"{P}lokr_w2_b": normal(1, 3000),
        f"{P}lokr_t2": normal(1, 1, 200, 200),
    },
    "loha, wide": loha((64, 3000), (3000, 64)),
    "loha, large": loha((30000, 3), (3, 30000)),
    "loha, core": loha((1, 3000), (1, 3000), (1, 1, 200, 200)),
    "tucker": {
        f"{P}lora_down.weight": normal(1, 2000, 1, 1),
        f"{P}lora_up.weight": normal(2000, 1, 1, 1),
        f"{P}lora_mid.weight": normal(1, 1, 300, 300),
    },
    "lora, large": {f"{P}lora_down.weight": normal(1, 200_000), f"{P}lora_up.weight": normal(200_000, 1)},
    "lora, many ranks": {f"{P}lora_down.weight": normal(5000, 40), f"{P}lora_up.weight": normal(70, 5000)},
}
WORK: dict[str, Callable[[LoRA], Any]] = {
    "norm": lambda lora: lora.norm(),
    "diff": lambda lora: list(differences(lora, lora)),
    "compare": lambda lora: lm.compare([lora, lora]),
    "merge": lambda lora: lm.merge([lora, lora]),
    "merge to a rank": lambda lora: lm.merge([lora, lora], rank=3),
    "merge by a budget": lambda lora: lm.merge([lora, lora], max_error=0.1),
    "ties": lambda lora: lm.merge([lora, lora], method="ties", rank=3),
    "tsv": lambda lora: lm.merge([lora, lora], method="tsv", rank=3),
    "l2": lambda lora: lm.merge([lora, lora], weights="l2", rank=3),
    "resize": lambda lora: lm.resize(lora, rank=2),
    "resize by a budget": lambda lora: lm.resize(lora, max_error=0.1),
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("case", HOSTILE)
def test_memory_is_in_proportion_to_the_file(case: str, work: str) -> None:
    if case == "lora, many ranks":
        layer = LowRank(up=HOSTILE[case][f"{P}lora_up.weight"], down=HOSTILE[case][f"{P}lora_down.weight"])
        lora = LoRA(name="a", architecture=None, dialect="kohya", layouts={"transformer.m": layer})
    else:
        lora = lm.load(HOSTILE[case])
    stored = sum(tensor.nbytes for tensor in HOSTILE[case].values())
    tracemalloc.start()
    try:
        WORK[work](lora)
    except LoRAMergeError as error:
        assert "transformer.m: " in str(error) or "times the" in str(error)  # noqa: PT017
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 3 * stored + 300e6


@pytest.mark.parametrize("kind", ["tucker", "loha", "loha-tucker", "lokr", "lokr-full", "lokr-w1", "lokr-both", "lokr-tucker"])  # fmt: skip
@pytest.mark.parametrize("rank", [1, 3, 30])
def test_a_norm_needs_no_expansion_and_is_right(kind: str, rank: int) -> None:
    layer = random_layer((40, 12, 3, 3), kind=kind, rank=rank, alpha=-2.5)
    up, down = layer.factors()

    assert layer.norm() == pytest.approx(np.linalg.norm(up.astype(float) @ down), rel=1e-6)
    assert layer.norm() == pytest.approx(dense_norm(layer.delta()), rel=1e-6)
    assert layer.rank == up.shape[1] <= 40


def test_an_architecture_that_knows_the_weight_vouches_for_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramerge.layers.base.IMPLIED", 10)
    monkeypatch.setattr("loramerge.layers.base.check_size.__defaults__", (10,))
    tensors = {k.replace("lora_unet_m", "lora_unet_input_blocks_4_1_proj_in"): v for k, v in HOSTILE["lokr, middling"].items()}  # fmt: skip

    with pytest.raises(LayerError, match="name the model family"):
        next(iter(lm.load(tensors).values())).delta()
    fitting = random_layer((640, 640), kind="lokr-full")
    assert fitting.delta().shape == (640, 640)


def test_ranks_above_the_sides_are_merged_right() -> None:
    layers = [random_layer((24, 18), rank=400, seed=seed) for seed in (1, 2)]
    loras = [LoRA(name="a", architecture=None, dialect="kohya", layouts={"unet.m": x}) for x in layers]
    wanted = sum(x.delta().astype(float) for x in layers)

    for options in ({}, {"max_error": 0.0}, {"method": "tsv"}):
        found = lm.merge(loras, **options)["unet.m"].delta()  # type: ignore[arg-type]
        if "method" not in options:
            assert relative_error(found, wanted) < 1e-6
    assert layers[0].norm() == pytest.approx(np.linalg.norm(layers[0].delta()), rel=1e-6)


class Bomb(LowRank):
    """A layer for which there is no memory."""

    def factors(self) -> tuple[Any, Any]:
        raise MemoryError("Unable to allocate 95.4 GiB")

    stored_factors = factors  # type: ignore[assignment]


@pytest.mark.parametrize("work", [name for name in WORK if "resize" not in name])
def test_memory_that_does_not_suffice_is_an_error_of_loramerge(work: str) -> None:
    bomb = Bomb(up=normal(8, 2), down=normal(2, 6), alpha=0.0)
    lora = LoRA(name="a", architecture=None, dialect="kohya", layouts={"unet.m": bomb})

    with pytest.raises(DeviceMemoryError, match=r"unet\.m: out of memory: Unable to allocate 95\.4 GiB$"):
        WORK[work](lora)


def test_a_command_without_memory_says_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise MemoryError("Unable to allocate 95.4 GiB")

    with pytest.raises(SystemExit, match="1"):
        guarded(command)
    assert capsys.readouterr().err == "Error: out of memory: Unable to allocate 95.4 GiB\n"


def bomb(depth: int, path: Path, *, legacy: bool, slot: bytes = b"r") -> Path:
    """A state dict whose one key is a tuple of two equal tuples, ``depth`` times."""
    import io
    import struct
    import zipfile

    key = b"X\x01\x00\x00\x00a\x85r\x00\x01\x00\x00"
    for level in range(depth):
        key += b"j" + struct.pack("<I", 256 + level) + b"\x86r" + struct.pack("<I", 257 + level)
    buffer = io.BytesIO()
    torch.save({"k": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=not legacy)

    def changed(data: bytes) -> bytes:
        at = data.index(b"X\x01\x00\x00\x00k")
        rest = data[at + 6 :]
        return data[:at] + key + (rest[2:] if rest[:1] == b"q" else rest)

    if legacy:
        path.write_bytes(changed(buffer.getvalue()))
        return path
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, changed(data) if name.endswith("data.pkl") else data)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("depth", [3, 30, 200])
def test_a_pickle_with_nested_keys_is_refused_before_it_is_built(legacy: bool, depth: int, tmp_path: Path) -> None:
    path = bomb(depth, tmp_path / "a.pt", legacy=legacy)  # hashing the key of 200 levels would take 2^200 steps

    with pytest.raises(LoRAMergeError, match="a key is a tuple" if depth == 3 else "nests tuples"):
        lm.load(path, allow_pickle=True)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_with_an_optimiser_is_still_read(legacy: bool, tmp_path: Path) -> None:
    pairs = {f"{P}lora_up.weight": torch.ones(6, 2), f"{P}lora_down.weight": torch.nn.Parameter(torch.ones(2, 5))}
    betas = (0.9, 0.999)
    groups = [{"betas": betas, "shapes": ((1, 2), (3, (4, 5))), "params": list(range(9))} for _ in range(300)]
    state = {i: {"step": torch.tensor(1.0), "moments": (betas, betas)} for i in range(50)}
    checkpoint = {"state_dict": OrderedDict(pairs), "optimizer": {"state": state, "param_groups": groups}, "epoch": 3}
    torch.save(checkpoint, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)

    assert list(lm.load(tmp_path / "a.pt", allow_pickle=True)) == ["transformer.m"]


QKV = [f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qkv"]


def fused_lokr() -> LoRA:
    stem = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    shapes = {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (1152, 5), "lokr_w2_b": (5, 768)}
    return lm.load({f"{stem}.{part}": normal(*shape) for part, shape in shapes.items()}, architecture="sd3-medium")


@pytest.mark.parametrize("case", ["joined LoKrs", "a lone part", "all parts"])
def test_the_size_of_a_plan_is_that_of_its_file(case: str) -> None:
    def chosen(module: str, shape: tuple[int, ...]) -> bool:
        return module in (QKV[:1] if case == "a lone part" else QKV)

    lora = fused_lokr() if case == "joined LoKrs" else random_lora("flux", rank=4, only=chosen, dtype="float32")
    plan = lm.plan([lora], weights=[0.5])

    assert plan.size == tensors_size(spell(plan.lora()))
    assert 0 < saved_size(plan.lora()) - plan.size < 4000  # the header
    lm.merge([lora], weights=[0.5])


def dora_base(folder: Path) -> tuple[LoRA, LoRA, str, np.ndarray]:
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = normal(640, 640)
    (folder / "base" / "unet").mkdir(parents=True)
    stored = {f"{module.removeprefix('unet.')}.weight": weight, "conv_in.weight": np.ones((320, 4, 3, 3), np.float32)}
    save_file(stored, folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    loras = [
        LoRA(name=kind, architecture="sdxl", dialect="kohya", layouts={module: random_layer((640, 640), kind=kind, rank=3)})
        for kind in ("dora", "lora")
    ]  # fmt: skip
    return *loras, str(folder / "base"), weight  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("rule", "scope"), [("l2", "module"), ("l2", "component"), ("l2", "whole"), ("energy", "whole")]
)
def test_rules_on_norms_take_a_dora_layer_on_its_base(rule: str, scope: Any, tmp_path: Path) -> None:
    dora, lora, base, weight = dora_base(tmp_path)
    module = next(iter(dora))
    deltas = [dora[module].delta_on(weight).astype(float), lora[module].delta().astype(float)]
    norms = [np.linalg.norm(d) for d in deltas]
    same = np.sqrt(np.mean(np.square(norms))) / np.linalg.norm(sum(deltas))
    weights = [n / sum(norms) for n in norms] if rule == "l2" else [same, same]
    wanted = sum(w * d for w, d in zip(weights, deltas, strict=True))

    merged = lm.merge([dora, lora], weights=rule, scope=scope, base=base, rank=640)
    files = [str(lm.save(x, tmp_path / f"{x.name}.safetensors")) for x in (dora, lora)]
    recipe = Recipe(
        loras=tuple(Input(path=f) for f in files), weights=rule, scope=scope, base=base, rank=640, output=Output()
    )
    baked = bake([dora, lora], base, tmp_path / "baked", weights=rule, scope=scope)

    assert relative_error(merged[module].delta(), wanted) < 1e-6
    assert relative_error(recipe.plan().lora()[module].delta(), wanted) < 1e-6
    assert baked.norm == pytest.approx(np.linalg.norm(wanted), rel=1e-6)
    done = CliRunner().invoke(app, ["merge", *files, "--base", base, "-r", "8", "--weights", rule, "--scope", scope, "-o", str(tmp_path / "o.safetensors")])  # fmt: skip
    assert done.exit_code == 0, done.output


def test_shares_of_norms_that_are_not_known_name_lora_and_module() -> None:
    dora = LoRA(name="mine", architecture=None, dialect="kohya", layouts={"unet.m": random_layer((8, 6), kind="dora")})

    with pytest.raises(LoRAMergeError, match=r"unet\.m"):
        lm.merge([dora, dora], weights="l2", rank=2)


@pytest.mark.parametrize("budget", [{"max_error": 0.1}, {"energy": 0.9}])
def test_a_recipe_with_a_budget_keeps_what_a_merge_keeps(budget: dict[str, Any], tmp_path: Path) -> None:
    layouts = {"unet.m": random_layer((8, 6), kind="dora"), "unet.n": random_layer((30, 20), rank=9)}
    lora = LoRA(name="mine", architecture=None, dialect="kohya", layouts=layouts)
    path = str(lm.save(lora, tmp_path / "a.safetensors"))

    planned = lm.plan([path], weights=[1.0], **budget)
    by_recipe = Recipe(loras=(Input(path=path),), weights=[1.0], output=Output(), **budget).plan()

    assert planned.ranks == by_recipe.ranks
    assert [planned.lora()[m].kind for m in planned.steps] == [by_recipe.lora()[m].kind for m in by_recipe.steps]


def test_a_mean_of_moments_says_what_both_depend_on() -> None:
    first, second = (Moments("core", ("a",), (), {}, {"seed": seed}) for seed in (1, 2))

    assert json.dumps(dict(first.averaged(second).identity)) == json.dumps({"mean of": [{"seed": 1}, {"seed": 2}]})
    assert first.averaged(first).identity == {"seed": 1}


NEEDS_SUMS: dict[str, Callable[[Any], object]] = {
    "columns, direct": lambda p: column_solution(p, 0.1, 1.0, "direct"),
    "columns, pcg": lambda p: column_solution(p, 0.1, 1.0, "pcg"),
    "full": lambda p: solve(p, "full", 0.1, "sum"),
    "a loss": lambda p: p.loss(p.down),
}


@pytest.mark.parametrize("missing", ["gram", "cross"])
@pytest.mark.parametrize("work", NEEDS_SUMS)
def test_what_needs_other_moments_is_refused(work: str, missing: str) -> None:
    from dataclasses import replace

    from dense import World

    with pytest.raises(MergeError, match="need moments of the kind 'gram'"):
        NEEDS_SUMS[work](replace(World().problem, **{missing: None}))


def test_what_grows_is_still_refused_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.files.writing, "SMALL", 1000)
    layouts = {"unet.m": random_layer((64, 64), kind="lokr-full")}
    lora = LoRA(name="mine", architecture=None, dialect="kohya", layouts=layouts)

    with pytest.raises(OptionError, match="allow_growth"):
        lm.merge([lora, lora])
    with pytest.raises(OptionError, match="allow_growth"):
        lm.average([lora, replace(lora)])
    assert lm.average([lora, replace(lora)], allow_growth=True)["unet.m"].rank == 64
