"""Text of strangers: files, headers, patterns and names are read within bounds, refused in words, and shown as they are."""

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from typer.testing import CliRunner

import loramerge as lm
import models
from loramerge.checkpoints import open_checkpoint
from loramerge.checkpoints.folders import shard_indexes
from loramerge.cli.app import app
from loramerge.cli.output import joined, say, table
from loramerge.comparing.plots import save_heatmap
from loramerge.errors import FileError, LoRAMergeError, OptionError
from loramerge.files.expressions import Effort, Expression
from loramerge.files.metadata import RECIPE
from loramerge.files.storage.texts import as_json, parsed, read_json, said, visible
from loramerge.learned.plots import draw
from loramerge.merging.coefficients import KEY, Coefficients
from loramerge.merging.ledger import Ledger
from loramerge.scoring.captions import METADATA, captioned
from loramerge.scoring.pictures import Preprocessing
from small import MODULES, small

QUERY = MODULES["sdxl"][0]
MODULE = MODULES["sdxl"][0]
HOSTILE = {
    "deep": "[" * 100_000,
    "deep, and whole": '{"a": ' + "[" * 200 + "]" * 200 + "}",
    "a number beyond floats": '{"a": 1e999}',
    "a number of 400 digits": '{"a": ' + "9" * 400 + "}",
    "a number of 5000 digits": '{"a": ' + "9" * 5000 + "}",
    "half a surrogate": '{"a": "\\ud800"}',
    "a list": "[1]",
    "a number": "1",
    "nothing": "",
    "not JSON": "{",
}
"""JSON that no reader may take."""


@pytest.mark.parametrize("case", HOSTILE)
def test_json_of_strangers_is_refused_with_its_place(case: str) -> None:
    with pytest.raises(FileError, match=r"^the place "):
        parsed(HOSTILE[case], "the place")
    assert said(HOSTILE[case]) == {}


def test_lists_that_take_many_times_their_room_are_refused() -> None:
    with pytest.raises(FileError, match="outside of strings"):
        parsed('{"a": [' + "[]," * 2_000_000 + "1]}", "x")


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_json_is_written_without_numbers_that_it_lacks(value: float) -> None:
    text = as_json({"a": [value, 1.5], "b": (2,)})

    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["b"] == [2]
    assert not re.search("Infinity|NaN", text)


READERS: dict[str, Callable[[Path], object]] = {
    "an index of shards": lambda path: shard_indexes(path.parent),
    "a table of a sweep": lambda path: Ledger(path.parent, None).entries,
    "a preprocessor": Preprocessing.read,
    "captions": lambda path: captioned(path.parent),
    "a configuration": lambda path: lm.open(path.parent),
    "a recipe": lm.Recipe.read,
}
NAMES = dict(
    zip(
        READERS,
        (
            "model.safetensors.index.json",
            "sweep.json",
            "preprocessor_config.json",
            METADATA,
            "adapter_config.json",
            "recipe.toml",
        ),
        strict=True,
    )
)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A folder with what the readers want beside their text."""
    (tmp_path / "1.png").write_bytes(b"")
    keys = {f"base_model.model.mid_block.{m}.lora_{x}.weight": np.ones((2, 2), "f") for m in "a" for x in "AB"}
    safetensors.numpy.save_file(keys, tmp_path / "adapter_model.safetensors")
    return tmp_path


def outcome(read: Callable[[Path], object], path: Path) -> object:
    """What is read, or None if it is refused in words."""
    try:
        return read(path)
    except LoRAMergeError:
        return None


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", HOSTILE)
def test_every_reader_of_text_refuses_what_is_none(reader: str, case: str, beside: Path) -> None:
    path = beside / NAMES[reader]
    path.write_text(HOSTILE[case])

    found = outcome(READERS[reader], path)

    assert not found or (reader == "captions" and case == "nothing")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "no UTF-8", "too large"])
def test_every_reader_of_text_wants_a_file_of_text(reader: str, kind: str, beside: Path) -> None:
    path = beside / NAMES[reader]
    make = {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "directory": path.mkdir,
        "no UTF-8": lambda: path.write_bytes(b"\xff{}"),
        "too large": lambda: path.write_bytes(b" " * 10_000_001),
    }
    make[kind]()

    assert not outcome(READERS[reader], path)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": []},
        {"weight_map": {"a": [1]}},
        {"weight_map": {"a": "b"}, "metadata": [1]},
        {"weight_map": {"a": None}},
    ],
)
def test_an_index_of_another_form_is_refused(index: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(FileError, match="no index of shards"):
        shard_indexes(tmp_path)


def test_a_message_does_not_list_every_missing_shard(tmp_path: Path) -> None:
    folder = models.folder(tmp_path / "m", models.base("flux"), shards=2)
    for file in (folder / "transformer").glob("*-00001-of-*.safetensors"):
        file.rename(str(file).replace("of-00002", "of-99999"))
    for file in (folder / "transformer").glob("*-of-00002.safetensors"):
        file.unlink()

    with pytest.raises(FileError, match=r"missing: 2, 3, .*…") as caught:
        open_checkpoint(folder)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "row",
    [
        {"name": "a", "figures": {"size": "large"}},
        {"name": "a", "figures": {"size": 1}},
        {"name": "a", "figures": [1]},
        {"figures": {"size": 1, "rank_min": 1, "rank_max": 1, "error": 1}},
        [1],
        None,
    ],
)
def test_a_row_of_a_sweep_that_is_none_is_no_earlier_merge(row: object, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"rows": [row]}))

    assert Ledger(tmp_path, None).entries == {}


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"shortest_edge": -1}},
        {"size": {"shortest_edge": 10**9}},
        {"crop_size": {"height": "a", "width": 1}},
        {"crop_size": {"height": 1, "width": None}},
        {"resample": 99},
        {"image_mean": [1, 2]},
        {"image_mean": ["a", "b", "c"]},
        {"image_std": [0, 1, 1]},
        {"rescale_factor": "a"},
    ],
)
def test_a_preprocessor_of_another_form_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"image_processor_type": "BitImageProcessor", **change}))

    with pytest.raises(FileError, match=re.escape("p.json")):
        Preprocessing.read(tmp_path / "p.json")


def headed(path: Path, **metadata: str) -> Path:
    """A LoRA with entries in its header."""
    tensors = {key: value.numpy() for key, value in small().state_dict("kohya").items()}
    safetensors.numpy.save_file(tensors, path, metadata)
    return path


RECIPES = {
    "a budget of 400 digits": {"budget": {"max_error": 10**400}},
    "a weight of 400 digits": {"inputs": [{"name": "a", "weight": {"x": 10**400}}]},
    "a name that is a list": {"inputs": [{"name": [[1]], "weight": 1}]},
    "inputs that are none": {"inputs": [1]},
    "a method that is a number": {"method": 5},
    "a budget that is a text": {"budget": {"max_error": "x"}},
}


@pytest.mark.parametrize("flag", [[], ["--json"], ["--recipe"]])
@pytest.mark.parametrize("case", [*HOSTILE, *RECIPES])
def test_inspect_leaves_out_what_it_can_not_read(case: str, flag: list[str], tmp_path: Path) -> None:
    recipe = {"inputs": [{"name": "a", "weight": 1}], "method": "linear", "rank": 4, "options": {}, "output": {}}
    text = HOSTILE[case] if case in HOSTILE else json.dumps(recipe | RECIPES[case])
    file = headed(tmp_path / "x.safetensors", loramerge=text, ss_tag_frequency=text)

    result = CliRunner().invoke(app, ["inspect", str(file), *flag])

    assert result.exception is None or isinstance(result.exception, LoRAMergeError | SystemExit)
    assert flag == ["--recipe"] or result.exit_code == 0


NAME = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"

ENDLESS = [
    "(([a-z_.0-9])+)+!",
    "(a|a)*b",
    "(.|.)" * 40,
    "a.*" * 12 + "!",
    "(?x)([a-z]+) +!",
    "([a-z]+)(?#x)+!",
    "(?=([a-z]+)+)!",
    "(?:[a-z.]{1,999}){999}",
    "a?" * 30 + "a" * 30,
    "[a-z_.0-9]*" * 3 + "!",
]
NO_EXPRESSIONS = ["(" * 400 + ")" * 399, "(" * 5000 + ")" * 5000, "a{99999999999999999999}", "(a", "[", "(?<=a+)b"]
ORDINARY = [
    r"attn[12]\.to_[kv]$",
    r"^(?!.*text).*attn",
    r"(?i)ATTN",
    r"down.*attn.*to_(q|k|v)",
    r"^unet\.(down|up)_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.\d+\.attn\d+\.to_q$",
    r"attn1(\.to_out\.\d+)?",
    r"(\.[a-z]+)+_q|to_q",
]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_without_end_is_refused(pattern: str) -> None:
    with pytest.raises(OptionError, match="too much work"):
        in_many(pattern)


@pytest.mark.parametrize("pattern", NO_EXPRESSIONS)
def test_what_is_no_pattern_is_called_so(pattern: str) -> None:
    with pytest.raises(OptionError, match="is not a regular expression"):
        in_many(pattern)


@pytest.mark.parametrize("pattern", ORDINARY[:-1])
def test_an_ordinary_pattern_finds_what_python_finds(pattern: str) -> None:
    assert in_many(pattern) == (re.search(pattern, NAME) is not None)


def in_many(pattern: str) -> bool:
    """What one pattern finds in as many names as a large LoRA has."""
    expression = Expression(pattern, Effort())
    return {expression.found_in(NAME) for _ in range(2000)}.pop()


PATTERNED: dict[str, Callable[[lm.LoRA, str], object]] = {
    "a weight": lambda lora, pattern: lm.plan([lora], weights=[{"*": 1.0, pattern: 0.5}]),
    "a weight as text": lambda lora, pattern: lm.plan([lora], weights=[f"1;{pattern}=0.5"]),
    "exclude": lambda lora, pattern: lm.plan([lora], exclude=[pattern]),
    "exclude in a conversion": lambda lora, pattern: lora.exclude(pattern),
    "exclude in a comparison": lambda lora, pattern: lm.compare([lora, lora], exclude=[pattern]),
    "a configuration": lambda lora, pattern: lm.load(PEFTS, config={"r": 4, "alpha_pattern": {pattern[3:]: 2}}),
}
STEM = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PEFTS = {f"{STEM}.lora_A.weight": np.ones((4, 640), "f"), f"{STEM}.lora_B.weight": np.ones((640, 4), "f")}


@pytest.mark.parametrize("pattern", [ENDLESS[0], ENDLESS[3], NO_EXPRESSIONS[1], NO_EXPRESSIONS[2]])
@pytest.mark.parametrize("place", PATTERNED)
def test_patterns_are_bounded_wherever_they_stand(place: str, pattern: str) -> None:
    with pytest.raises(LoRAMergeError, match=r"too much work|is not a regular expression"):
        PATTERNED[place](small(), f"re:{pattern}")


def test_infinity_survives_a_recipe_and_a_header(tmp_path: Path) -> None:
    for i in (1, 2):
        lm.save(small(seed=i, modules=(QUERY,)), tmp_path / f"{i}.safetensors", dialect="kohya")
    planned = lm.plan([tmp_path / f"{i}.safetensors" for i in (1, 2)], method="np_lora", mu=float("inf"))
    merged = lm.save(planned.lora(), tmp_path / "merged.safetensors")

    recipe = lm.Recipe.of(lm.open(merged))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    again = lm.Recipe.read(tmp_path / "recipe.toml").run(tmp_path / "again.safetensors")

    assert recipe.options["mu"] == float("inf")
    assert "Infinity" not in lm.open(merged).metadata[RECIPE]
    assert again.read_bytes() == merged.read_bytes()


CONTROLS = "\x1b[31m \x07\r\n\x7f\x9b2J\u202e\u2066\u200f\u2028\u2029\ufeff"
"""What a terminal acts on: controls of both sets, line ends, and marks of direction."""


def hidden(text: str) -> list[str]:
    """The characters of a printed text that it has no right to."""
    return [c for c in text if not c.isprintable() and c != "\n"]


def test_nothing_hidden_is_left_in_a_visible_text() -> None:
    shown = visible(CONTROLS + "\udcff")

    assert shown.isprintable()
    assert shown.startswith(r"\x1b[31m \x07\r\n\x7f\x9b2J\u202e")


@pytest.mark.parametrize("text", ["a name.safetensors", "モデル", "عربى", "👩\u200d🎨 été", "a\u00a0b"])
def test_an_ordinary_text_is_shown_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_a_value_never_ends_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nb", table(["x\ny"], [["1\n2"]]), joined(["c", "d\ne"]))

    assert capsys.readouterr().out.splitlines() == [r"a\nb", r"x\ny", "────", r"1\n2", "c", r"d\ne"]


@pytest.fixture
def shouting(tmp_path: Path) -> Path:
    """LoRAs and other files whose every name and string has what a terminal acts on."""
    tensors = {f"lora_unet_{CONTROLS}.lora_{x}.weight": np.ones(s, "f") for x, s in (("down", (2, 4)), ("up", (4, 2)))}
    metadata = {
        "ss_sd_model_name": CONTROLS,
        "modelspec.trigger_phrase": CONTROLS,
        "ss_tag_frequency": json.dumps({"f": {CONTROLS: 5}}),
        RECIPE: json.dumps(
            {"inputs": [{"name": CONTROLS, "weight": {CONTROLS: 1}}] * 2, "method": CONTROLS, "rank": CONTROLS}
        ),
    }
    folder = tmp_path / "a\x1b[31m\n"
    folder.mkdir()
    for i, name in enumerate(("b\x1b]0;x\x07.safetensors", "c\u202e.safetensors")):
        stray = {CONTROLS: np.ones(2, "f")} if i else {}
        safetensors.numpy.save_file({**tensors, **stray}, folder / name, metadata)
    safetensors.numpy.save_file({CONTROLS: np.ones(2, "f")}, folder / "none.safetensors")
    return folder


COMMANDS = {
    "inspect": ["inspect", "{0}"],
    "inspect with a stray": ["inspect", "{1}"],
    "inspect --norms": ["inspect", "{0}", "--norms"],
    "inspect --json": ["inspect", "{0}", "--json"],
    "inspect --recipe": ["inspect", "{0}", "--recipe"],
    "inspect no LoRA": ["inspect", "{2}"],
    "metadata": ["metadata", "{0}"],
    "metadata --json": ["metadata", "{0}", "--json"],
    "metadata --set": ["metadata", "{0}", "--set", "\x1b=\x1b[31m\n", "--set", "modelspec.thumbnail=data:image/\x1b"],
    "metadata --remove": ["metadata", "{0}", "--remove", "\x1b[31m"],
    "average": ["average", "{0}", "{1}", "-o", "{out}"],
    "average --ema": ["average", "{0}", "{1}", "-o", "{out}", "--ema", "sigma=\x1b"],
    "an unclear order": ["average", "{0}", "{1}", "-o", "{out}", "--ema", "sigma=0.1"],
    "check": ["check", "{0}", "{1}", "--for", "comfyui"],
    "check --json": ["check", "{0}", "--for", "a1111", "--json"],
    "check --sarif": ["check", "{0}", "--for", "peft", "--sarif"],
    "diff": ["diff", "{0}", "{0}"],
    "diff of two": ["diff", "{0}", "{1}"],
    "compare": ["compare", "{0}", "{1}", "--modules"],
    "compare --json": ["compare", "{0}", "{1}", "--json"],
    "convert": ["convert", "{1}", "--to", "kohya", "-o", "{out}"],
    "convert, lossy": ["convert", "{1}", "--to", "comfyui", "-o", "{out}", "--allow-lossy"],
    "merge": ["merge", "{0}", "{1}", "-o", "{out}"],
    "merge --advice": ["merge", "{0}", "{1}", "--dry-run", "--advice"],
    "merge at a rank": ["merge", "{0}", "{1}", "-o", "{out}", "--rank", "1"],
    "resize": ["resize", "{0}", "-o", "{out}", "--max-error", "1%"],
    "nothing there": ["inspect", "{0}x"],
    "a pattern": ["merge", "{0}", "-o", "{out}", "-w", "1;\x1b[31m\n=2"],
    "a recipe": ["merge", "{0}.toml"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_what_a_terminal_acts_on(command: str, shouting: Path) -> None:
    files = sorted(map(str, shouting.glob("*.safetensors")))
    out = str(shouting / "out\x1b.safetensors")
    arguments = [text.format(*files, out=out) for text in COMMANDS[command]]

    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-m", "loramerge", *arguments], capture_output=True, check=False, timeout=60
    )

    text = (done.stdout + done.stderr).decode("utf-8")
    assert text
    assert "Traceback" not in text
    assert hidden(text) == []


def test_names_in_pictures_are_text(tmp_path: Path) -> None:
    names = ("a$^$.safetensors", "モデル عربى \x1b\udcff\n.safetensors")
    loras = [small(seed=i, name=name, modules=(QUERY,)) for i, name in enumerate(names)]
    learned = Coefficients.of({QUERY: np.ones((2, 640), np.float32)}, loras, [1.0, 1.0])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix in ("png", "svg"):
            save_heatmap(lm.compare(loras), tmp_path / f"heat.{suffix}")
            draw(learned, tmp_path / f"plot.{suffix}")

    assert "a$^$" in (tmp_path / "heat.svg").read_text()


def test_a_legend_has_names_that_begin_with_an_underscore(tmp_path: Path) -> None:
    loras = [small(seed=i, name=name, modules=(QUERY,)) for i, name in enumerate(["_x", "y"])]

    path = draw(Coefficients.of({QUERY: np.ones((2, 640), np.float32)}, loras, [1.0, 1.0]), tmp_path / "plot.svg")

    drawn = path.read_text()
    assert [drawn.count(f"<!-- {name} -->") for name in ("_x", "y")] == [1, 1]


def coefficients(path: Path, matrix: np.ndarray, module: str = MODULE, **said: Any) -> Path:
    found = {"others": [1.0, 1.0], "names": ["a", "b"], "provenance": {}, **said}
    safetensors.numpy.save_file({module: matrix} if module else {}, path, {KEY: json.dumps(found)})
    return path


WHOLE = np.ones((2, 640), np.float32)

WRONG_COEFFICIENTS: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "one axis": (np.ones(5, np.float32), {}),
    "no column": (np.ones((2, 0), np.float32), {}),
    "a row too many": (np.ones((3, 640), np.float32), {}),
    "integers": (np.ones((2, 640), np.int32), {}),
    "NaN": (np.full((2, 640), np.nan, np.float32), {}),
    "fewer names": (WHOLE, {"names": ["a"]}),
    "no names": (WHOLE, {"names": [], "others": []}),
    "names that are a number": (WHOLE, {"names": 5}),
    "weights without end": (WHOLE, {"others": ["inf", 1]}),
    "weights that are texts": (WHOLE, {"others": ["a", "b"]}),
    "a provenance that is a list": (WHOLE, {"provenance": [1]}),
    "no module": (WHOLE, {"module": ""}),
}


@pytest.mark.parametrize("case", WRONG_COEFFICIENTS)
def test_coefficients_of_another_form_are_refused(case: str, tmp_path: Path) -> None:
    matrix, changes = WRONG_COEFFICIENTS[case]
    path = coefficients(tmp_path / "c.safetensors", matrix, **changes)

    with pytest.raises(LoRAMergeError, match=re.escape("c.safetensors")):
        Coefficients.read(path)


@pytest.mark.parametrize("module", ["x", "a.blocks." + "9" * 5000 + ".x", "\x1b.transformer_blocks.1.x"])
@pytest.mark.parametrize("value", [1.0, 3e38])
def test_coefficients_of_any_module_are_shown(module: str, value: float, tmp_path: Path) -> None:
    path = coefficients(tmp_path / "c.safetensors", np.full((2, 640), value, np.float32), module)

    result = CliRunner().invoke(app, ["coefficients", str(path)])

    assert result.exit_code == 0
    assert hidden(result.output) == []


OTHERS = {
    b"\x89PNG\r\n\x1a\n" + bytes(20): "a picture",
    b"\xff\xd8\xff\xe0" + bytes(20): "a picture",
    b"GIF89a" + bytes(20): "a picture",
    b"RIFF\x10\0\0\0WEBPVP8 ": "a picture",
    b"GGUF\x03\0\0\0" + bytes(20): "a GGUF file",
    b"PK\x05\x06" + bytes(18): "an archive",
    b"PK\x03\x04" + bytes(18): "a zip file",
    b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + bytes(18): "an archive",
    b"7z\xbc\xaf\x27\x1c" + bytes(18): "an archive",
    b"\x93NUMPY\x01\0" + bytes(18): "NumPy",
    b"%PDF-1.7\n" + bytes(18): "a PDF",
    b"\x7fELF\x02\x01\x01\0" + bytes(18): "a program",
    b"<!DOCTYPE html>": "a web page",
    b'{"a": 1}      ': "a JSON file",
    b"these are words": "a text file",
}


@pytest.mark.parametrize("data", OTHERS)
def test_a_file_of_another_kind_is_called_what_it_is(data: bytes) -> None:
    with pytest.raises(FileError, match=OTHERS[data]) as caught:
        lm.load(data)
    assert "hostile" not in str(caught.value)


def test_a_header_that_is_cut_is_never_called_another_kind() -> None:
    with pytest.raises(FileError, match="truncated"):
        lm.load(b"\x7b\0\0\0\0\0\0\0{}")


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    for i, name in enumerate("ab"):
        lm.save(small(seed=i, modules=(QUERY,)), tmp_path / f"{name}.safetensors", dialect="kohya")
    (tmp_path / "r.toml").write_text('[[loras]]\npath = "a.safetensors"\n')
    (tmp_path / "scores.py").write_text(
        "import math\ndef nan(l): return {'x': math.nan, 'y': math.inf}\ndef fails(l): raise RuntimeError('a\\nb')\n"
    )
    (tmp_path / "broken.py").write_text("raise RuntimeError('broken')\n")
    (tmp_path / "ends.py").write_text("import sys; sys.exit(3)\n")
    (tmp_path / "mine.py").write_text(
        "from loramerge.merging.methods import equal_rank, method\n"
        "@method('mine', source='x', rank=equal_rank)\n"
        "def mine(layers, weights, *, size: float = 1.0):\n    'Mine.'\n    return layers[0]\n"
    )
    return tmp_path


MISTAKES = {
    "a setting": (["sweep", "r.toml", "--set", "seed=1", "-o", "o"], r"Available: method, rank, max_error, energy"),
    "a value of a setting": (["sweep", "r.toml", "--set", "max_error=x", "-o", "o"], "Error: max_error is a share"),
    "a LoRA as a recipe": (["sweep", "a.safetensors", "--set", "rank=1", "-o", "o"], "is a LoRA, not a recipe"),
    "a score that ends": (["sweep", "r.toml", "--set", "rank=1", "-o", "o", "--score", "ends:f"], "SystemExit"),
    "a broken score": (["sweep", "r.toml", "--set", "rank=1", "-o", "o", "--score", "broken:f"], "broken"),
    "a rank": (["merge", "a.safetensors", "-o", "o.safetensors", "--rank", "²"], "neither a positive integer"),
    "a long rank": (["merge", "a.safetensors", "-o", "o.safetensors", "--rank", "9" * 5000], "neither a positive"),
    "a negative rank": (
        ["merge", "a.safetensors", "-o", "o.safetensors", "--rank", "-3"],
        "neither a positive integer",
    ),
    "a size": (["resize", "a.safetensors", "-o", "o.safetensors", "--max-size", "9" * 20 + "GB"], "number of bytes"),
    "a long size": (["resize", "a.safetensors", "-o", "o.safetensors", "--max-size", "9" * 400], "number of bytes"),
    "a device": (["merge", "a.safetensors", "-o", "o.safetensors", "--device", "meta"], "Can't compute on the device"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_words(mistake: str, pair: Path) -> None:
    arguments, message = MISTAKES[mistake]

    done = subprocess.run(
        [sys.executable, "-m", "loramerge", *arguments], cwd=pair, capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["methods"], ["--help"], ["merge", "--help"], ["inspect", "a.safetensors"]])
def test_commands_run_without_docstrings(command: list[str], pair: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "loramerge", *command], cwd=pair, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("option", ["device", "rank", "weights", "loras", "progress", "base", "method"])
def test_an_argument_among_a_recipes_options_is_refused(option: str, pair: Path) -> None:
    (pair / "r.toml").write_text(
        f'method = "mine:mine"\n[options]\n{option} = "cpu"\n[[loras]]\npath = "a.safetensors"\n'
    )

    with pytest.raises(OptionError, match=f"'{option}' is not an option"):
        lm.Recipe.read(pair / "r.toml")


CALLED: dict[str, Callable[[Path], object]] = {
    "merge": lambda folder: lm.merge([folder / "a.safetensors"], progress=5),  # type: ignore[arg-type]
    "plan": lambda folder: lm.plan([folder / "a.safetensors"], max_error=0.1, progress=5),  # type: ignore[arg-type]
    "resize": lambda folder: lm.resize(folder / "a.safetensors", rank=1, progress=5),  # type: ignore[arg-type]
    "save": lambda folder: lm.save(small(), folder / "o.safetensors", progress=5),  # type: ignore[arg-type]
    "compare": lambda folder: lm.compare([small(), small()], progress=5),  # type: ignore[arg-type]
    "sweep": lambda folder: lm.sweep(folder / "r.toml", {"rank": [1]}, folder / "o", score=5),  # type: ignore[arg-type]
    "in_memory": lambda folder: small().in_memory(5),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("function", CALLED)
def test_what_is_to_be_called_must_be_a_function(function: str, pair: Path) -> None:
    with pytest.raises(OptionError, match="is 5, wanted a function"):
        CALLED[function](pair)


def test_a_sweeps_table_is_json_whatever_the_score_gave(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(pair))
    from scores import fails, nan

    with pytest.raises(LoRAMergeError, match=r"a\nb"):
        lm.sweep(pair / "r.toml", {"rank": [1]}, pair / "o", score=fails)
    assert "failed" in table_of(pair)["rows"][0]

    (row,) = lm.sweep(pair / "r.toml", {"rank": [1]}, pair / "o", score=nan)
    assert (row["x"], row["y"]) == (None, None)
    assert "failed" not in table_of(pair)["rows"][0]


def test_what_failed_before_is_not_said_of_a_sweep_without_that_score(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(pair))
    from scores import fails

    with pytest.raises(LoRAMergeError):
        lm.sweep(pair / "r.toml", {"rank": [1]}, pair / "o", score=fails)
    (row,) = lm.sweep(pair / "r.toml", {"rank": [1]}, pair / "o")

    assert row.reused
    assert "failed" not in table_of(pair)["rows"][0]


def table_of(folder: Path) -> dict[str, Any]:
    """The table, read as JSON that has no NaN."""
    text = (folder / "o" / "sweep.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    return read_json(folder / "o" / "sweep.json")


@pytest.mark.parametrize("name", ["a.safetensors", "renamed.toml", "adapter", "x.pt"])
def test_a_lora_is_no_recipe(name: str, pair: Path) -> None:
    (pair / "renamed.toml").write_bytes((pair / "a.safetensors").read_bytes())
    lm.save(small(), pair / "adapter", dialect="peft")
    torch.save({}, pair / "x.pt")

    with pytest.raises(FileError, match="is a LoRA, not a recipe"):
        lm.Recipe.read(pair / name)


@pytest.mark.parametrize("line", ['{"file_name": 1, "text": "a"}', '{"file_name": "1.png", "text": [1]}', '["1.png"]'])
def test_a_caption_is_a_text_for_a_name(line: str, beside: Path) -> None:
    (beside / METADATA).write_text(line)

    with pytest.raises(FileError, match=METADATA):
        captioned(beside)


def test_a_long_name_in_a_list_of_captions_is_told(beside: Path) -> None:
    (beside / METADATA).write_text(json.dumps({"file_name": "a" * 5000, "text": "a"}))

    with pytest.raises(FileError, match="names 'aaa"):
        captioned(beside)


def test_a_line_separator_in_a_caption_ends_no_line(beside: Path) -> None:
    (beside / METADATA).write_text('{"file_name": "1.png", "text": "a\u2028b"}\n', encoding="utf-8")

    assert captioned(beside)[0].caption == "a\u2028b"


def test_weights_that_are_tiny_have_a_mean(pair: Path) -> None:
    files = [pair / "a.safetensors", pair / "b.safetensors"]
    tiny, ordinary = (lm.merge(files, weights=[w, w], method="cart") for w in (1e-12, 1.0))

    np.testing.assert_allclose(tiny[QUERY].delta(), 1e-12 * ordinary[QUERY].delta(), rtol=1e-3, atol=1e-18)
    with pytest.raises(lm.errors.MergeError, match="add up to zero"):
        lm.merge(files, weights=[1e-12, -1e-12], method="cart")


@pytest.mark.parametrize(
    "weights",
    [
        [torch.tensor(0.5), torch.tensor(0.25)],
        [{"*": torch.tensor(0.5)}, np.array(0.25)],
        torch.tensor([0.5, 0.25]),
        np.array([0.5, 0.25]),
        [np.float32(0.5), np.float64(0.25)],
    ],
)
def test_scalars_and_arrays_of_any_library_are_weights(weights: Any) -> None:
    loras = [small(seed=i, modules=(QUERY,)) for i in (1, 2)]

    found, wanted = (lm.merge(loras, weights=w)[QUERY].delta() for w in (weights, [0.5, 0.25]))

    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("weight", [torch.ones(2), np.ones(2), True, np.True_])
def test_what_is_no_number_is_no_weight(weight: Any) -> None:
    with pytest.raises(OptionError, match="Can't read the weight"):
        lm.merge([small(), small()], weights=[weight, 0.5])


@pytest.mark.parametrize("field", ["use_rslora", "use_dora"])
def test_a_switch_of_a_configuration_is_true_or_false(field: str) -> None:
    with pytest.raises(FileError, match=f"{field} is 'false'"):
        lm.load(PEFTS, config={"r": 4, field: "false"})
