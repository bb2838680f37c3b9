"""The nodes for ComfyUI, with stand-ins for the few things that they take from it; tools/comfyui runs them in the real one."""

import asyncio
import importlib.util
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loramerge as lm
from loramerge.errors import FileError, MergeError, OptionError
from loramerge.testing import random_lora, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

PACK = Path(__file__).parents[1] / "integrations/comfyui"
STAND_INS = Path(__file__).parent / "comfyui"
Stack = Any


def opened() -> ModuleType:
    """The pack as ComfyUI imports it."""
    name = "nodes_of_loramerge"
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec
    assert spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ComfyUI's folder of LoRAs, with two of them."""
    found = tmp_path / "loras"
    (found / "people").mkdir(parents=True)
    lm.save(random_lora("sd15", rank=4, alpha=2.0, seed=1), found / "people/person.safetensors", dialect="kohya")
    lm.save(random_lora("sd15", rank=8, seed=2), found / "jersey.safetensors", dialect="diffusers-peft")
    return found


@pytest.fixture
def pack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The functions of the nodes by title, and the pack's modules."""
    _forget()
    monkeypatch.syspath_prepend(STAND_INS)
    import comfy  # type: ignore[import-not-found]
    import folder_paths  # type: ignore[import-not-found]

    folder_paths.folders["loras"] = [str(folder)]
    module = opened()
    nodes = sys.modules["nodes_of_loramerge.nodes"].NODES
    yield {"module": module, "comfy": comfy, **{node.id.removeprefix("Loramerge"): node for node in nodes}}
    _forget()


def _forget() -> None:
    """Have the next import of the pack, and of what it takes from ComfyUI, begin anew."""
    for name in [
        n for n in sys.modules if n.partition(".")[0] in ("comfy", "comfy_api", "folder_paths", "nodes_of_loramerge")
    ]:
        del sys.modules[name]


def stack(pack: dict[str, Any], **blocks: str) -> Stack:
    (first,) = pack["File"].run(file="people/person.safetensors", weight=0.7, blocks=blocks.get("person", ""))
    (both,) = pack["File"].run(file="jersey.safetensors", weight=0.5, blocks=blocks.get("jersey", ""), loras=first)
    return both


def merged(pack: dict[str, Any], loras: Stack, **more: Any) -> Stack:
    inputs = {"strength": "as given", "method": "linear", "options": "", "fit": "exact", "limit": ""} | more
    (found,) = pack["Merge"].run(loras=loras, **inputs)
    return found


def saved(pack: dict[str, Any], loras: Stack, name: str, **more: Any) -> str:
    inputs = {"dialect": "comfyui", "dtype": "as it is", "overwrite": False} | more
    (found,) = pack["Save"].run(loras=loras, name=name, **inputs)
    return str(found)


def worst(a: lm.LoRA, b: lm.LoRA) -> float:
    assert set(a) == set(b)
    return max(relative_error(a[m].delta(), b[m].delta()) for m in a)


def test_the_merge_that_is_saved_is_the_librarys_own(pack: dict[str, Any], folder: Path) -> None:
    weights = [{"*": 0.7, "text_encoder": 0.1}, 0.5]
    wanted = lm.merge([folder / "people/person.safetensors", folder / "jersey.safetensors"], weights=weights, rank=3)

    saved(pack, merged(pack, stack(pack, person="text_encoder=0.1"), fit="rank", limit="3"), "both")

    assert worst(lm.load(folder / "both.safetensors"), wanted) < 1e-6


@pytest.mark.parametrize(
    ("node", "wanted"),
    [
        ({"strength": "sqrt"}, {"weights": "sqrt"}),
        ({"method": "ties", "options": "density=0.3 space=core"}, {"method": "ties", "density": 0.3, "space": "core"}),
        ({"fit": "energy", "limit": "50%"}, {"energy": 0.5}),
        ({"fit": "error", "limit": "0.9"}, {"max_error": 0.9}),
        ({"fit": "size", "limit": "200kB"}, {"max_size": 200_000}),
        ({"fit": "largest rank"}, {"rank": "max"}),
    ],
    ids=lambda given: " ".join(map(str, given.values())),
)
def test_every_widget_of_merge_is_an_argument_of_the_library(
    pack: dict[str, Any], folder: Path, node: dict[str, str], wanted: dict[str, Any]
) -> None:
    loras = [folder / "people/person.safetensors", folder / "jersey.safetensors"]

    (found,) = merged(pack, stack(pack), **node)

    assert found.weight == 1
    assert worst(found.lora, lm.merge(loras, **{"weights": [0.7, 0.5], **wanted})) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "dora"])
def test_a_patch_is_the_file_that_would_be_saved(pack: dict[str, Any], folder: Path, kind: str) -> None:
    lm.save(random_lora("sd15", kind=kind, seed=3), folder / "third.safetensors", dialect="kohya")
    (third,) = pack["File"].run(file="third.safetensors", weight=0.5, blocks="")

    model, clip, report = pack["Apply"].run(
        model=pack["comfy"].Model("diffusion_model."),
        clip=pack["comfy"].Clip("text_encoders."),
        loras=third,
        strength_model=2.0,
        strength_clip=1.0,
    )

    saved(pack, (third[0]._replace(weight=1),), "saved")
    wanted = lm.load(folder / "saved.safetensors").state_dict("comfyui")
    ((tensors, strength),) = model.patches
    assert {key: value.numpy().tobytes() for key, value in tensors.items()} == {
        key: value.numpy().tobytes() for key, value in wanted.items()
    }
    assert (strength, clip.patches[0][1]) == (1.0, 0.5)
    assert report == f"third.safetensors: {len(wanted)} of {len(wanted)} tensors act"


def test_weights_by_block_act_on_their_modules(pack: dict[str, Any], folder: Path) -> None:
    (person,) = pack["File"].run(file="people/person.safetensors", weight=0.7, blocks="text_encoder=0;*to_q=-1")

    model, _, _ = pack["Apply"].run(
        model=pack["comfy"].Model("diffusion_model."),
        loras=person,
        strength_model=1.0,
        strength_clip=1.0,
    )

    original = lm.load(folder / "people/person.safetensors")
    found = {}
    for tensors, strength in model.patches:
        part = lm.load(tensors, architecture="sd15")
        found |= {module: strength * np.asarray(part[module].delta()) for module in part}
    weights = {m: -1 if m.endswith("to_q") else 0.7 for m in original if not m.startswith("text_encoder")}
    assert found.keys() == weights.keys()
    for module, weight in weights.items():
        assert relative_error(found[module], weight * np.asarray(original[module].delta())) < 1e-6


def test_a_file_that_leaves_its_family_open_gets_it_from_the_node(pack: dict[str, Any], folder: Path) -> None:
    unet = random_lora("sdxl").exclude("text_encoder*")
    save_file({key: tensor.numpy() for key, tensor in unet.state_dict("kohya").items()}, folder / "open.safetensors")
    inputs = {"file": "open.safetensors", "weight": 1.0, "blocks": ""}

    assert len(pack["File"].run(**inputs)[0][0].lora.families) > 1
    assert pack["File"].run(**inputs, family="kolors")[0][0].lora.families == ("kolors",)


def test_an_old_pickle_is_read_as_comfyui_reads_it_tensors_only(pack: dict[str, Any], folder: Path) -> None:
    torch.save(random_lora("sd15").state_dict("kohya"), folder / "old.pt")
    torch.save({"a": Path("/")}, folder / "code.pt")
    inputs = {"weight": 1.0, "blocks": ""}

    assert pack["File"].run(file="old.pt", **inputs)[0][0].lora.architecture == "sd15"
    with pytest.raises(FileError):
        pack["File"].run(file="code.pt", **inputs)


def test_what_a_model_has_no_place_for_is_said(pack: dict[str, Any]) -> None:
    given = {"loras": stack(pack)[:1], "strength_model": 1.0, "strength_clip": 1.0}

    _, clip, report = pack["Apply"].run(model=pack["comfy"].Model("diffusion_model."), **given)

    assert clip is None
    assert "the model has no place for text_encoders.clip_l" in report
    with pytest.raises(MergeError, match="this model has none of its 12 layers"):
        pack["Apply"].run(model=pack["comfy"].Model("another."), **given)


def test_a_saved_merge_holds_a_recipe_that_gives_it_again(pack: dict[str, Any], folder: Path) -> None:
    saved(pack, merged(pack, stack(pack), method="ties", options="density=0.5"), "ties")
    (again,) = pack["File"].run(file="ties.safetensors", weight=1.0, blocks="")

    text, _, recipe = pack["Inspect"].run(loras=again)
    (found,) = pack["Recipe"].run(recipe=recipe)

    assert "merged from:   person.safetensors × 0.7, jersey.safetensors × 0.5 by ties, rank sum" in text.splitlines()
    assert worst(found[0].lora, again[0].lora) == 0


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        ('method = "os:system"\n[[loras]]\npath = "jersey.safetensors"', OptionError, "loramerge's own methods only"),
        ('[[loras]]\nhub = "someone/barca-lora-sdxl"', OptionError, "ComfyUI's own LoRAs only"),
        ('[[loras]]\npath = "../secret.safetensors"', OptionError, "no file in ComfyUI's folders"),
        ('[[loras]]\npath = "/etc/passwd"', OptionError, "no file in ComfyUI's folders"),
        ('weights = "/tmp/w.safetensors"\n[[loras]]\npath = "jersey.safetensors"', OptionError, "no file in ComfyUI's"),
        (
            'base = "/tmp/m.safetensors"\n[[loras]]\npath = "jersey.safetensors"',
            OptionError,
            "Can't find the base model",
        ),
        ("[[loras", FileError, "the recipe is not TOML"),
        ('[[loras]]\npath = "jersey.safetensors"\nweigth = 1', OptionError, "weigth"),
    ],
)
def test_a_recipe_reaches_nothing_but_comfyuis_folders(
    pack: dict[str, Any], folder: Path, recipe: str, error: type[Exception], words: str
) -> None:
    lm.save(random_lora("sd15"), folder.parent / "secret.safetensors")

    with pytest.raises(error) as told:
        pack["Recipe"].run(recipe=recipe)

    assert words in str(told.value)


def test_a_lora_in_the_layout_of_peft_is_saved_as_a_file_or_refused(pack: dict[str, Any], folder: Path) -> None:
    adapter = lm.save(random_lora("sd15").exclude("text_encoder*"), folder / "adapter", dialect="peft")
    (loras,) = pack["File"].run(
        file=str((adapter / "adapter_model.safetensors").relative_to(folder)), weight=1.0, blocks=""
    )

    with pytest.raises(OptionError, match=r"saved as a folder, .* Way out: the dialect comfyui"):
        saved(pack, loras, "adapter", dialect="as it is")

    assert not (folder / "adapter.safetensors").exists()
    assert saved(pack, loras, "adapter") == "adapter.safetensors"


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "people/../../out", "", "people/", "jersey"])
def test_a_file_is_saved_in_the_folder_of_loras_and_replaces_none(
    pack: dict[str, Any], folder: Path, name: str
) -> None:
    before = sorted(folder.parent.rglob("*"))

    with pytest.raises(OptionError):
        saved(pack, merged(pack, stack(pack)), name)

    assert sorted(folder.parent.rglob("*")) == before


def test_a_file_is_replaced_if_that_is_asked_for(pack: dict[str, Any], folder: Path) -> None:
    assert saved(pack, merged(pack, stack(pack)), "people/new/both") == str(Path("people/new/both.safetensors"))
    saved(pack, merged(pack, stack(pack)[:1]), "jersey", overwrite=True)

    assert len(lm.load(folder / "people/new/both.safetensors")) == 12
    assert lm.load(folder / "jersey.safetensors").summary("rank") == "rank 4"


def test_a_weight_is_never_lost_on_the_way_to_a_file(pack: dict[str, Any]) -> None:
    for loras in (stack(pack), stack(pack)[:1]):
        with pytest.raises(OptionError, match="takes one LoRA at weight 1"):
            saved(pack, loras, "lost")


def test_a_comparison_is_a_table_and_a_picture(pack: dict[str, Any]) -> None:
    table, picture = pack["Compare"].run(loras=stack(pack))

    assert table.splitlines()[:2] == ["a = person.safetensors", "b = jersey.safetensors"]
    assert picture.ndim == 4
    assert picture.shape[::3] == (1, 3)
    assert (float(picture.min()), float(picture.max())) == (0.0, 1.0)


def test_a_stack_is_made_smaller_lora_by_lora(pack: dict[str, Any]) -> None:
    (small,) = pack["Resize"].run(loras=stack(pack), fit="rank", limit="2")

    assert [(each.lora.summary("rank"), each.weight) for each in small] == [("rank 2", 0.7), ("rank 2", 0.5)]


def test_comfyuis_bar_goes_to_its_end_and_can_stop_a_merge(pack: dict[str, Any]) -> None:
    bars = pack["comfy"].utils.BARS

    merged(pack, stack(pack))

    assert bars[-1] == (12, 12)
    pack["comfy"].utils.STOP.append(True)
    with pytest.raises(pack["comfy"].utils.Stopped):
        merged(pack, stack(pack))


def test_a_node_runs_again_when_its_file_has_changed(pack: dict[str, Any], folder: Path) -> None:
    recipe = '[[loras]]\npath = "jersey.safetensors"'
    before = pack["File"].state(file="jersey.safetensors", weight=1.0), pack["Recipe"].state(recipe=recipe)

    lm.save(random_lora("sd15", rank=2), folder / "jersey.safetensors")

    after = pack["File"].state(file="jersey.safetensors", weight=1.0), pack["Recipe"].state(recipe=recipe)
    assert before[0] != after[0]
    assert before[1] != after[1]


def classes(pack: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The nodes by name in both APIs."""
    import nodes_of_loramerge.mappings as older  # type: ignore[import-not-found]

    extension = asyncio.run(pack["module"].comfy_entrypoint())
    newer = {found.define_schema().node_id: found for found in asyncio.run(extension.get_node_list())}
    return older.NODE_CLASS_MAPPINGS, newer


def test_both_apis_offer_the_same_nodes(pack: dict[str, Any]) -> None:
    older, newer = classes(pack)

    assert older.keys() == newer.keys()
    for name, cls in older.items():
        schema, inputs = newer[name].define_schema(), cls.INPUT_TYPES()
        assert [i.id for i in schema.inputs if not i.optional] == list(inputs["required"])
        assert [i.id for i in schema.inputs if i.optional] == list(inputs["optional"])
        for given in schema.inputs:
            kind, options = {**inputs["required"], **inputs["optional"]}[given.id]
            assert given.spelled() == (kind, options)
        assert tuple(o.io_type for o in schema.outputs) == cls.RETURN_TYPES
        assert tuple(o.display_name for o in schema.outputs) == cls.RETURN_NAMES
        assert (schema.description, schema.is_output_node) == (cls.DESCRIPTION, cls.OUTPUT_NODE)
        assert hasattr(cls, "IS_CHANGED") == ("fingerprint_inputs" in vars(newer[name]))


def test_both_apis_run_the_same_functions(pack: dict[str, Any]) -> None:
    given = {"loras": merged(pack, stack(pack)), "dialect": "kohya", "dtype": "float16", "overwrite": True, "name": "a"}
    older, newer = (found["LoramergeSave"] for found in classes(pack))

    assert getattr(older(), older.FUNCTION)(**given) == {
        "ui": {"text": ("a.safetensors",)},
        "result": ("a.safetensors",),
    }
    output = newer.execute(**given)
    assert (output.args, output.ui) == (("a.safetensors",), {"text": ("a.safetensors",)})


def test_an_older_comfyui_gets_mappings(pack: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _forget()
    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)

    module = opened()

    assert not hasattr(module, "comfy_entrypoint")
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert len(module.NODE_CLASS_MAPPINGS) == 8


def test_the_nodes_import_no_model_library(folder: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(STAND_INS)!r}, {str(PACK.parent)!r}]; import comfyui; "
        "print({'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_registry_finds_the_pack() -> None:
    told = tomllib.loads((PACK / "pyproject.toml").read_text())

    assert told["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName"}
    assert told["project"]["dependencies"] == (PACK / "requirements.txt").read_text().split()


WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_and_its_picture_are_of_todays_nodes(path: Path, pack: dict[str, Any]) -> None:
    images = pytest.importorskip("PIL.Image")
    older, _ = classes(pack)
    workflow = json.loads(path.read_text(encoding="utf-8"))
    with images.open(path.with_suffix(".png")) as picture:
        inside, prompt = (json.loads(picture.info[key]) for key in ("workflow", "prompt"))

    assert inside == workflow
    ours = {str(node["id"]): node for node in workflow["nodes"] if node["type"].startswith("Loramerge")}
    for key, node in ours.items():
        inputs = {**older[node["type"]].INPUT_TYPES()["required"], **older[node["type"]].INPUT_TYPES()["optional"]}
        assert prompt[key]["class_type"] == node["type"]
        assert prompt[key]["inputs"].keys() <= inputs.keys()
        assert [o["type"] for o in node["outputs"]] == list(older[node["type"]].RETURN_TYPES)
        widgets = {k: v for k, v in prompt[key]["inputs"].items() if not isinstance(v, list)}
        assert list(widgets.values()) == node["widgets_values"]


def test_the_guide_shows_a_picture_that_is_a_workflow() -> None:
    assert (PACK.parents[1] / "docs/how-to/comfyui.png").read_bytes() == (
        PACK / "example_workflows/look.png"
    ).read_bytes()


def test_workflows_show_every_node(pack: dict[str, Any]) -> None:
    shown = {node["type"] for path in WORKFLOWS for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}

    assert shown >= classes(pack)[0].keys()
