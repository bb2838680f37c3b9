"""Loading and saving: by path, directory and Hub name."""

import copy
import gc
import hashlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

import loramerge as lm
from hub_server import Hub, serving
from listings import config, filled, listing
from loramerge.errors import FileError
from loramerge.files.hub import Reference, parse
from loramerge.files.storage import reader
from loramerge.layers import LowRank
from loramerge.testing import random_lora, relative_error, weighted_sum
from small import MODULES, small
from still_open import on_linux, still_open

SMALL_LISTINGS = [
    "flux_xlabs",
    "sd15_catundchat_diffusers_old_bare",
    "sd15_cloneofsimo_analog_svd_rank4",
    "sd15_kohya_lora_r4a1",
    "sd21_vfph55_diffusers_new_bf16",
]


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "np") as file:
        return dict(file.metadata() or {})


@pytest.mark.parametrize("name", SMALL_LISTINGS)
def test_a_file_goes_back_to_its_own_dialect_as_it_was(name: str, tmp_path: Path) -> None:
    safetensors.numpy.save_file(filled(name), tmp_path / "a.safetensors", listing(name).get("metadata"))

    with lm.open(tmp_path / "a.safetensors") as lora:
        lm.save(lora, tmp_path / "b.safetensors")

    before, after = ((tmp_path / f"{x}.safetensors").read_bytes() for x in "ab")
    assert sorted(before) == sorted(after)
    assert safetensors.torch.load(after).keys() == filled(name).keys()
    assert metadata_of(tmp_path / "a.safetensors") == metadata_of(tmp_path / "b.safetensors")
    start = 8 + struct.unpack("<Q", before[:8])[0]
    assert before[start:] == after[start:]


def test_our_bytes_are_the_reference_implementations(tmp_path: Path) -> None:
    lora = small(dtype="bfloat16", alpha=2.0)
    path = lm.save(lora, tmp_path / "a.safetensors", dialect="comfyui")

    tensors = lora.state_dict("comfyui")

    ours, theirs = path.read_bytes(), safetensors.torch.save(tensors, metadata=metadata_of(path))
    start = 8 + struct.unpack("<Q", theirs[:8])[0]
    assert ours[:8] == theirs[:8]
    assert json.loads(ours[8:start]) == json.loads(theirs[8:start])
    assert ours[start:] == theirs[start:]


def test_a_header_whose_metadata_is_null_is_read_as_by_the_reference_implementation() -> None:
    written = safetensors.numpy.save({"foo.lora_down.weight": np.ones((1, 2)), "foo.lora_up.weight": np.ones((3, 1))})
    (length,) = struct.unpack("<Q", written[:8])
    header = json.dumps({"__metadata__": None, **json.loads(written[8 : 8 + length])}).encode()
    null = struct.pack("<Q", len(header)) + header + written[8 + length :]

    assert safetensors.numpy.load(null).keys() == {"foo.lora_down.weight", "foo.lora_up.weight"}
    assert lm.load(null).metadata == {}


@pytest.mark.parametrize("workers", [2, 5])
def test_bytes_are_the_same_for_any_number_of_threads(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramerge.files.storage.writer.SMALL", 0)
    merged = lm.plan([small(seed=1), small(seed=2)], rank=3).lora()

    one = lm.save(merged, tmp_path / "one.safetensors", dialect="kohya")
    many = lm.save(merged, tmp_path / "many.safetensors", dialect="kohya", workers=workers)

    assert one.read_bytes() == many.read_bytes()


def test_a_streamed_merge_is_the_merge_in_memory(tmp_path: Path) -> None:
    paths = [lm.save(small(seed=i), tmp_path / f"{i}.safetensors", dialect="kohya") for i in range(2)]

    streamed = lm.save(lm.plan(paths, rank=3).lora(), tmp_path / "a.safetensors")
    in_memory = lm.save(lm.merge(paths, rank=3), tmp_path / "b.safetensors")

    assert streamed.read_bytes() == in_memory.read_bytes()


@pytest.mark.parametrize(
    ("dtypes", "wanted"), [(("float16",) * 2, "F16"), (("float16", "float32"), "F32"), (("float16", "bfloat16"), "F16")]
)
def test_a_merge_is_saved_in_the_widest_of_its_inputs_dtypes(
    dtypes: tuple[str, str], wanted: str, tmp_path: Path
) -> None:
    merged = lm.merge([small(seed=i, dtype=dtype) for i, dtype in enumerate(dtypes)])

    found = lm.load(lm.save(merged, tmp_path / "a.safetensors", dialect="diffusers"))

    assert {layer.dtype for layer in found.values()} == {wanted}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_dtype_asked_for_is_kept_to(dtype: str, tmp_path: Path) -> None:
    path = lm.save(small(), tmp_path / "a.safetensors", dialect="diffusers", dtype=dtype)

    assert {str(t.dtype) for t in safetensors.torch.load_file(path).values()} == {f"torch.{dtype}"}


def test_an_open_file_reads_only_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lm.save(small(), tmp_path / "a.safetensors", dialect="diffusers")
    lora = lm.open(path)
    read: list[int] = []
    original = lora.files[0].opened.read
    monkeypatch.setattr(lora.files[0].opened, "read", lambda offset, size: read.append(size) or original(offset, size))

    layer = lora[MODULES["sdxl"][0]]

    assert sum(read) == layer.up.nbytes + layer.down.nbytes


def test_a_resize_reads_every_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lm.open(lm.save(small(rank=4), tmp_path / "a.safetensors", dialect="diffusers"))
    read: list[int] = []
    original = lora.files[0].opened.read
    monkeypatch.setattr(lora.files[0].opened, "read", lambda offset, size: read.append(size) or original(offset, size))

    layers = dict(lm.plan([lora], weights=[1.0], rank=2).lora().items())

    assert layers.keys() == lora.keys()
    assert sum(read) == sum(
        tensor.nbytes for tensor in safetensors.numpy.load_file(tmp_path / "a.safetensors").values()
    )


@pytest.mark.parametrize("dialect", ["kohya", "diffusers-peft"])
def test_the_layers_of_a_file_are_checked_when_it_is_opened_and_not_again(dialect: str, tmp_path: Path) -> None:
    lora = lm.open(lm.save(small(dialect=dialect, alpha=2.0), tmp_path / "a.safetensors"))
    checks = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal checks
        checks += event == "call" and frame.f_code.co_name == LowRank.__post_init__.__name__

    sys.setprofile(count)
    try:
        layers = list(lora.values())
    finally:
        sys.setprofile(None)
    assert [layer.rank for layer in layers] == [4] * len(MODULES["sdxl"])
    assert checks == 0


def test_a_closed_file_says_so(tmp_path: Path) -> None:
    path = lm.save(small(), tmp_path / "a.safetensors", dialect="diffusers")
    with lm.open(path) as lora:
        pass

    with pytest.raises(lm.errors.FileError, match="is closed"):
        lora[MODULES["sdxl"][0]]


def in_folders(folder: Path) -> Path:
    """PEFT's directory with an adapter for the denoiser and one for a text encoder."""
    return lm.save(small(), folder / "peft", dialect="peft")


def of_several(folder: Path) -> Path:
    """A file with two adapters in its keys."""
    tensors = safetensors.numpy.load_file(lm.save(small(), folder / "a", dialect="peft") / "adapter_model.safetensors")
    named = {key.replace(".weight", f".{name}.weight"): t for key, t in tensors.items() for name in ("one", "two")}
    safetensors.numpy.save_file(named, folder / "adapters.safetensors")
    return folder / "adapters.safetensors"


@on_linux
@pytest.mark.parametrize("make", [in_folders, of_several])
def test_every_file_of_a_lora_is_closed_with_it(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    adapter = "one" if path.is_file() else None

    loaded = lm.load(path, adapter=adapter)
    assert still_open(tmp_path) == []

    with lm.open(path, adapter=adapter) as lora:
        assert still_open(tmp_path) != []
    assert still_open(tmp_path) == []
    assert loaded.keys() == lora.keys()


@on_linux
def test_a_file_that_is_open_when_python_ends_is_closed_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = reader.OpenFile(lm.save(random_lora("sd15"), tmp_path / "a.safetensors"))

    with monkeypatch.context() as ending:
        ending.setattr(reader, "os", None)
        file.__del__()

    with pytest.raises(FileError, match="is closed"):
        file.read(0, 8)


def test_a_file_that_is_refused_is_closed(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    (in_folders(tmp_path) / "text_encoder/adapter_config.json").write_text("[]")

    with pytest.raises(lm.errors.NotALoRAError) as first:
        lm.open(tmp_path / "a.safetensors")
    with pytest.raises(lm.errors.FileError) as second:
        lm.load(tmp_path / "peft")

    assert first.tb
    assert second.tb
    assert still_open(tmp_path) == []


def test_a_loaded_lora_may_be_for_every_family_that_an_opened_one_may(tmp_path: Path) -> None:
    name = "sdxl_lycoris_locon_tucker"
    safetensors.numpy.save_file(filled(name), tmp_path / "a.safetensors", listing(name).get("metadata"))

    with lm.open(tmp_path / "a.safetensors") as lora:
        assert lm.load(tmp_path / "a.safetensors").families == lora.families == ("sdxl", "kolors")


def test_a_loaded_lora_needs_its_file_no_more(tmp_path: Path) -> None:
    path = lm.save(small(), tmp_path / "a.safetensors", dialect="diffusers")
    lora = lm.load(path)
    path.unlink()

    assert lora[MODULES["sdxl"][0]].delta().any()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
@pytest.mark.parametrize("read", [lm.load, lm.open])
def test_a_file_in_memory_is_read_as_on_the_disk(read: Any, kind: Any, tmp_path: Path) -> None:
    path = lm.save(small(alpha=2.0), tmp_path / "a.safetensors", dialect="kohya")
    on_disk, data = lm.load(path), bytearray(path.read_bytes())

    lora = read(kind(data))
    data[-1000:] = bytes(1000)

    assert lora.sha256 == on_disk.sha256
    assert lora.metadata == on_disk.metadata
    assert all(np.array_equal(lora[m].delta(), on_disk[m].delta()) for m in on_disk)
    assert lm.merge([lora, path])


def test_an_open_file_is_read_from_where_it_is(tmp_path: Path) -> None:
    path = lm.save(small(), tmp_path / "a.safetensors", dialect="kohya")

    with path.open("rb") as file:
        assert set(lm.load(file)) == set(MODULES["sdxl"])
    with pytest.raises(lm.errors.FileError, match="closed"):
        lm.load(file)


@pytest.mark.parametrize("source", [None, 3, 0.5, ["a.safetensors"], {1}, object(), np.ones(3), io.StringIO("a")])
def test_what_is_no_lora_at_all_is_told_what_is_taken(source: Any) -> None:
    with pytest.raises(
        lm.errors.OptionError, match=r"of the type .* Wanted a path, a name on the Hub, a state dict, or"
    ):
        lm.load(source)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_in_memory_is_refused_with_a_way_out_that_works(zipped: bool) -> None:
    lora, file = small(), io.BytesIO()
    torch.save(lora.state_dict(), file, _use_new_zipfile_serialization=zipped)
    file.seek(0)

    with pytest.raises(lm.errors.FileError, match=r"a pickle.*Way out: torch.load\(…, weights_only=True\)"):
        lm.load(file)
    file.seek(0)
    assert set(lm.load(torch.load(file, weights_only=True))) == set(lora)


@pytest.mark.parametrize("together", [lm.merge, lm.plan, lm.compare])
def test_bytes_are_one_lora_and_no_list(together: Any) -> None:
    with pytest.raises(lm.errors.OptionError, match="Give a list of"):
        together(b"abc")


def test_kohyas_hashes_are_right(tmp_path: Path) -> None:
    lora = small(rank=64, modules=MODULES["sdxl"])
    path = lm.save(lora, tmp_path / "a.safetensors", dialect="kohya")
    metadata, tensors = metadata_of(path), safetensors.torch.load_file(path)

    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    image = safetensors.torch.save(tensors, kept)
    start = 8 + struct.unpack("<Q", image[:8])[0]

    assert metadata["sshs_model_hash"] == hashlib.sha256(image[start:]).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(image[0x100000:0x110000]).hexdigest()[:8]


def test_metadata_is_carried_and_what_would_be_wrong_is_not(tmp_path: Path) -> None:
    lora = small()
    keys = lora.state_dict("kohya")
    metadata = {
        "ss_tag_frequency": '{"a": {"psq-person": 12}}',
        "modelspec.title": "Person",
        "sshs_model_hash": "stale",
    }
    safetensors.torch.save_file(keys, tmp_path / "a.safetensors", {**metadata, "modelspec.hash_sha256": "stale"})

    lm.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers-peft")

    found = metadata_of(tmp_path / "b.safetensors")
    assert found["ss_tag_frequency"] == metadata["ss_tag_frequency"]
    assert found["modelspec.title"] == "Person"
    assert "sshs_model_hash" not in found
    assert "modelspec.hash_sha256" not in found


def test_a_merged_file_says_how_it_was_made(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        keys = small(seed=i).state_dict("kohya")
        paths.append(tmp_path / f"{i}.safetensors")
        safetensors.torch.save_file(keys, paths[-1], {"modelspec.title": f"T{i}", "ss_base_model_version": "sdxl"})

    metadata = metadata_of(lm.save(lm.merge(paths, weights=[0.7, -0.2], rank=3), tmp_path / "m.safetensors"))

    recipe = json.loads(metadata["loramerge"])
    assert [(i["name"], i["weight"]) for i in recipe["inputs"]] == [("0.safetensors", 0.7), ("1.safetensors", -0.2)]
    assert (recipe["method"], recipe["rank"]) == ("linear", 3)
    assert recipe["inputs"][1]["metadata"] == {"modelspec.title": "T1"}
    assert metadata["modelspec.merged_from"] == "T0, T1"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"


def test_a_peft_directory_is_written_and_read(tmp_path: Path) -> None:
    lora = small(rank=lambda module: 2 + len(module) % 3)

    folder = lm.save(lora, tmp_path / "adapter", dialect="peft")

    found = lm.load(folder)
    assert found.dialect == "peft"
    assert set(found) == set(lora)
    assert (folder / "text_encoder" / "adapter_config.json").exists()
    for module in lora:
        np.testing.assert_array_equal(found[module].delta(), lora[module].delta())


@pytest.mark.parametrize("typed", [".", "..", "../person", "../person/"])
def test_a_directory_has_its_name_whatever_leads_to_it(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.save(random_lora("sd15"), tmp_path / "person", dialect="peft")
    monkeypatch.chdir(tmp_path / "person" / "text_encoder" if typed == ".." else tmp_path / "person")

    with lm.open(typed) as lora:
        assert lora.name == "person"
        assert lora.origin
        assert lora.origin.source == "person"


def test_peft_goes_back_with_its_own_scale(tmp_path: Path) -> None:
    name = "sd15_hyper07_peft_base_model"
    folder = tmp_path / "in"
    folder.mkdir()
    safetensors.numpy.save_file(filled(name), folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config(name)[""]))

    lm.save(lm.load(folder), tmp_path / "out")

    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == config(name)[""]
    assert safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == filled(name).keys()


def test_a_peft_adapter_without_its_configuration_is_refused(tmp_path: Path) -> None:
    folder = lm.save(small("flux", MODULES["flux"][:1]), tmp_path / "adapter", dialect="peft")
    (folder / "adapter_config.json").unlink()

    with pytest.raises(lm.errors.FileError, match="holds the adapter's scale"):
        lm.load(folder)


def test_a_directory_of_diffusers_is_read(tmp_path: Path) -> None:
    lm.save(small(), tmp_path / "pytorch_lora_weights.safetensors", dialect="diffusers")
    lm.save(small(seed=9), tmp_path / "other.safetensors", dialect="diffusers")

    assert lm.load(tmp_path).name == "pytorch_lora_weights.safetensors"


def test_a_directory_with_several_files_asks_which(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lm.save(small(), tmp_path / f"{name}.safetensors", dialect="kohya")

    with pytest.raises(lm.errors.FileError, match="name one"):
        lm.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("someone/lora", ("someone/lora", None, None)),
        ("someone/lora/a.safetensors", ("someone/lora", "a.safetensors", None)),
        ("hf://someone/lora@v1.0", ("someone/lora", None, "v1.0")),
        ("hf://someone/lora/sub/a.safetensors@refs/pr/1", ("someone/lora", "sub/a.safetensors", "refs/pr/1")),
        ("someone/lora@v2/a.safetensors", ("someone/lora", "a.safetensors", "v2")),
        ("hf://someone/lora@v2/sub/a.safetensors", ("someone/lora", "sub/a.safetensors", "v2")),
        ("hf://models/someone/lora@v2/a.safetensors", ("someone/lora", "a.safetensors", "v2")),
        ("hf://someone/lora@refs/pr/1", ("someone/lora", None, "refs/pr/1")),
        ("hf://someone/lora@v2/", ("someone/lora", None, "v2")),
        ("someone/lora/", None),
        ("hf://someone/lora@refs/pr/1/sub/a.safetensors", ("someone/lora", "sub/a.safetensors", "refs/pr/1")),
        (
            "hf://someone/lora@refs/convert/bf16-v2/a.safetensors",
            ("someone/lora", "a.safetensors", "refs/convert/bf16-v2"),
        ),
        ("hf://someone/lora@new%2Fstyle/a.safetensors", ("someone/lora", "a.safetensors", "new/style")),
        ("hf://someone/lora@v2/a@0.7.safetensors", ("someone/lora", "a@0.7.safetensors", "v2")),
        ("someone/lora/a.safetensors@new/style", ("someone/lora", "a.safetensors", "new/style")),
        ("../lora/a.safetensors", None),
        ("/home/lora", None),
        ("lora", None),
    ],
)
def test_hub_names_are_parsed(text: str, reference: tuple[str, str | None, str | None] | None) -> None:
    assert parse(text) == reference


@pytest.mark.parametrize("file", [None, "a.safetensors", "sub/a.safetensors", "a@0.7.safetensors"])
@pytest.mark.parametrize("revision", [None, "main", "v1.0", "refs/pr/1", "new/style", "0123abcd"])
def test_a_name_on_the_hub_is_read_back(file: str | None, revision: str | None) -> None:
    if file is None or "@" not in file or revision:
        reference = Reference("someone/lora", file, revision)

        assert parse(str(reference)) == reference


@pytest.mark.parametrize("file", ["", "/a.safetensors", "/sub/a.safetensors", "/a@0.7.safetensors"])
@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", "refs/convert/bf16-v2", "new%2Fstyle"])
def test_the_hubs_own_library_reads_a_name_the_same_way(file: str, revision: str) -> None:
    theirs = pytest.importorskip("huggingface_hub.utils._hf_uris").parse_hf_uri

    ours, own = parse(f"hf://someone/lora@{revision}{file}"), theirs(f"hf://someone/lora@{revision}{file}")

    assert ours == (own.id, own.path_in_repo or None, own.revision)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://huggingface.co/some/lora/blob/main/sub/x.safetensors", "some/lora/sub/x.safetensors,"),
        ("https://huggingface.co/some/lora/resolve/v1/x.safetensors?download=true", "some/lora/x.safetensors@v1,"),
        ("https://hf.co/some/lora", "some/lora,"),
        ("https://civitai.com/models/1", "download the file first"),
    ],
)
def test_a_url_is_told_what_to_write_instead(url: str, name: str) -> None:
    with pytest.raises(lm.errors.FileError, match=f"URLs are not fetched.*Way out: {name}"):
        lm.open(url)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("hub")
    content = lm.save(small(), folder / "x.safetensors", dialect="kohya").read_bytes()
    repos = Hub()
    repos.add("someone/lora", {"readme.md": b"", "x.safetensors": content}, tags=("v1", "v2"))
    repos.add("secret/lora", {"x.safetensors": content}, gated=True)
    with serving(repos):
        yield {**os.environ, "HF_ENDPOINT": repos.url, "HF_HOME": str(folder / "home")}


def inspected(name: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loramerge", "inspect", name, "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "name", ["someone/lora", "someone/lora/x.safetensors", "hf://someone/lora@main", "someone/lora@main/x.safetensors"]
)
def test_a_repository_on_the_hub_is_opened(name: str, hub: dict[str, str]) -> None:
    assert set(json.loads(inspected(name, hub).stdout)["modules"]) == set(MODULES["sdxl"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "nobody/lora",
            "there is no repository nobody/lora, or it is private. Ways out: check the name; for a private",
        ),
        ("nobody/lora/x.safetensors", "If a local file was meant: there is none called nobody/lora."),
        ("someone/lora@v9", "the repository has no revision 'v9'. It has main, v1, v2."),
        ("someone/lora/x.safetensors@v9", "the repository has no revision 'v9'."),
        (
            "someone/lora/X1.safetensors",
            "no file 'X1.safetensors'. Did you mean 'x.safetensors'? It has x.safetensors.",
        ),
        ("secret/lora/x.safetensors", "the repository is gated. Way out: accept its terms at http://127.0.0.1:"),
    ],
)
def test_what_the_hub_does_not_have_is_named_with_what_it_has(name: str, said: str, hub: dict[str, str]) -> None:
    found = inspected(name, hub)

    assert found.returncode == 1
    assert f"Can't get {name.replace('@', ' at ')} from the Hub: " in found.stderr
    assert said in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_hub_that_does_not_answer_is_named(hub: dict[str, str], tmp_path: Path) -> None:
    nobody = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}

    found = inspected("someone/lora/x.safetensors", nobody)

    assert found.returncode == 1
    assert "http://127.0.0.1:9 can't be reached, and it is not in the cache" in found.stderr


def test_what_was_fetched_once_is_found_without_a_network(hub: dict[str, str]) -> None:
    inspected("someone/lora", hub)

    found = inspected("someone/lora", {**hub, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"})

    assert set(json.loads(found.stdout)["modules"]) == set(MODULES["sdxl"])


@pytest.mark.parametrize("name", ["someone/other", "someone/other/x.safetensors"])
@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE is set"), ("HF_ENDPOINT", "http://nowhere.invalid", "no network")],
)
def test_without_a_network_one_line_says_so(
    name: str, variable: str, value: str, why: str, hub: dict[str, str]
) -> None:
    direct = {key: text for key, text in hub.items() if not key.lower().endswith("_proxy")}

    found = inspected(name, {**direct, variable: value})

    assert found.returncode == 1
    assert f"Can't get {name} from the Hub: " in found.stderr
    assert why in found.stderr
    assert found.stderr.count("\n") == 1


def test_of_several_adapters_in_a_directory_one_must_be_named(tmp_path: Path) -> None:
    lm.save(small("flux", MODULES["flux"][:1]), tmp_path / "all" / "checkpoint-500", dialect="peft")
    assert set(lm.load(tmp_path / "all")) == set(MODULES["flux"][:1])

    lm.save(small("flux", MODULES["flux"][:1]), tmp_path / "all" / "checkpoint-900", dialect="peft")
    with pytest.raises(lm.errors.FileError, match=r"holds 2 adapters.*checkpoint-500"):
        lm.load(tmp_path / "all")


def test_a_peft_directory_that_is_written_again_keeps_nothing_of_the_old(tmp_path: Path) -> None:
    lm.save(small(), tmp_path / "a", dialect="peft")
    (tmp_path / "a" / "README.md").write_text("mine")

    lm.save(small(modules=MODULES["sdxl"][:1]), tmp_path / "a", dialect="peft")

    assert set(lm.load(tmp_path / "a")) == set(MODULES["sdxl"][:1])
    assert (tmp_path / "a" / "README.md").read_text() == "mine"


def test_a_peft_directory_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    lm.save(small(), tmp_path / "a", dialect="peft")
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    broken = small(seed=3)
    broken[MODULES["sdxl"][3]].up[0, 0] = np.nan

    with pytest.raises(lm.errors.NumberError):
        lm.save(broken, tmp_path / "a", dialect="peft")

    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before


def test_whole_weights_that_peft_trained_beside_a_lora_are_kept_and_said() -> None:
    keys = small(modules=MODULES["sdxl"][:1]).state_dict("peft")
    whole = {"base_model.model.conv_out.weight": np.ones((4, 320, 3, 3), dtype=np.float32)}
    config = {"r": 4, "lora_alpha": 4, "modules_to_save": ["conv_out"]}

    lora = lm.open({**keys, **whole}, config=config)

    assert list(lora.extras) == list(whole)
    assert "the whole weights of conv_out are no part of the LoRA" in lora.notes[-1]


def test_a_peft_file_without_a_configuration_says_what_is_assumed() -> None:
    lora = lm.load(small("flux", MODULES["flux"][:1]).state_dict("peft"))

    assert "adapter_config.json is missing" in lora.notes[0]


def test_a_copy_of_an_open_lora_leaves_the_file_open(tmp_path: Path) -> None:
    lora = lm.open(lm.save(small(), tmp_path / "a.safetensors", dialect="kohya"))
    module = MODULES["sdxl"][0]

    copied = copy.deepcopy(lora)
    again = pickle.loads(pickle.dumps(lora))
    del copied
    gc.collect()

    np.testing.assert_array_equal(lora[module].delta(), again[module].delta())


@pytest.mark.parametrize("std", [1e-2, 1e-3, 1e-4])
def test_faint_factors_keep_their_digits_in_float16(std: float, tmp_path: Path) -> None:
    module = MODULES["sdxl"][0]
    rng = np.random.default_rng(1)
    loras = [
        lm.load(
            {
                f"{module}.lora_A.weight": (0.03 * rng.standard_normal((64, 640))).astype(np.float16),
                f"{module}.lora_B.weight": (std * rng.standard_normal((640, 64))).astype(np.float16),
                f"{module}.alpha": np.array(1, np.float16),
            },
            architecture="sdxl",
        )
        for _ in range(2)
    ]

    merged = lm.merge(loras, weights=[0.5, 0.5])

    for dialect in ("kohya", "diffusers", "comfyui"):
        again = lm.load(lm.save(merged, tmp_path / "m.safetensors", dialect=dialect))
        assert relative_error(again[module].delta(), weighted_sum(loras, [0.5, 0.5], module)) <= 5e-4


def test_values_that_would_all_become_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(lm.errors.NumberError, match="every value is 0"):
        lm.save(lm.merge([small()], weights=[1e-20]), tmp_path / "m.safetensors", dialect="peft", dtype="float16")


def test_systems_without_positioned_reading_and_writing_have_a_way(tmp_path: Path) -> None:
    from loramerge.files.storage.reader import read_there, write_there

    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    write_there(fd, b"world", 6)
    write_there(fd, b"hello ", 0)

    assert read_there(fd, 5, 6) == b"world"
    os.close(fd)


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = lm.save(small(seed=1), tmp_path / "a.safetensors", dialect="kohya")
    path.chmod(0o640)

    lm.save(small(seed=2), path, dialect="kohya")

    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(("dialect", "file"), [("kohya", ""), ("peft", "text_encoder/adapter_config.json")])
def test_a_read_only_file_is_not_replaced(dialect: str, file: str, tmp_path: Path) -> None:
    name = "a" if dialect == "peft" else "a.safetensors"
    path = lm.save(small(seed=1), tmp_path / name, dialect=dialect)
    (path / file if file else path).chmod(0o444)
    before = lm.load(path).sha256

    with pytest.raises(lm.errors.FileError, match="read-only"):
        lm.save(small(seed=2), path, dialect=dialect)

    assert lm.load(path).sha256 == before


def test_of_files_and_adapters_in_a_directory_one_must_be_named(tmp_path: Path) -> None:
    lm.save(small(), tmp_path / "adapter", dialect="peft")
    lm.save(small(), tmp_path / "file.safetensors", dialect="kohya")

    with pytest.raises(lm.errors.FileError, match=r"holds 2 adapters.*adapter.*file\.safetensors"):
        lm.load(tmp_path)


@pytest.mark.parametrize("typed", ["person", "persn.safetensors", "person.safetensor"])
def test_a_file_like_the_missing_one_is_suggested(typed: str, tmp_path: Path) -> None:
    path = lm.save(small(), tmp_path / "person.safetensors", dialect="kohya")

    with pytest.raises(lm.errors.FileError, match=re.escape(f"Did you mean {path}?")):
        lm.open(tmp_path / typed)


def test_a_configuration_that_is_given_loses_no_text_encoder(tmp_path: Path) -> None:
    lora = random_lora("sdxl", rank=4, alpha=2.0)
    folder = lm.save(lora, tmp_path / "peft", dialect="peft")
    config = json.loads((folder / "adapter_config.json").read_text())

    again = lm.load(lm.save(lm.open(folder, config=config), tmp_path / "copy"))

    assert set(again) == set(lora)
    np.testing.assert_allclose(again[next(iter(lora))].delta(), lora[next(iter(lora))].delta(), rtol=1e-6)


def test_a_directory_keeps_no_older_pickle_of_an_adapter(tmp_path: Path) -> None:
    folder = lm.save(random_lora("sdxl", rank=4), tmp_path / "peft", dialect="peft")
    for component in ("", "text_encoder"):
        (folder / component / "adapter_model.bin").write_bytes(b"old")
    unet = random_lora("sdxl", rank=4).select("unet.*")

    lm.save(unet, folder, dialect="peft")

    assert set(lm.load(folder)) == set(unet)


def test_strings_for_a_header_go_with_a_state_dict_only(tmp_path: Path) -> None:
    file = lm.save(random_lora("sdxl", rank=1), tmp_path / "a.safetensors")
    for source in (file, file.read_bytes()):
        with pytest.raises(lm.errors.OptionError, match="metadata= is for a state dict"):
            lm.open(source, metadata={"a": "b"})


def test_patterns_that_leave_nothing_are_refused_in_words() -> None:
    lora = random_lora("sdxl", rank=1)
    with pytest.raises(lm.errors.OptionError, match=r"No module of .* is left: every one matches"):
        lora.exclude("*")
    with pytest.raises(lm.errors.OptionError, match=r"No module of .* matches nonsense"):
        lora.select("nonsense*")
    with pytest.raises(lm.errors.LoRAMergeError):
        lm.merge([], exclude=["unet.*"])
