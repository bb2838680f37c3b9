"""Several files are one: a directory that is read while it is replaced, written by several at once, or only half written."""

import errno
import gc
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loramerge as lm
from loramerge.comparing.plots import save_heatmap
from loramerge.files import hub, reading, writing
from loramerge.files.storage import reader, scratch, writer
from loramerge.learned.plots import draw
from loramerge.merging.coefficients import Coefficients
from small import MODULES, small

UNET, TEXT = MODULES["sdxl"][:1], MODULES["sdxl"][3:]
OLD, NEW = small(modules=UNET + TEXT, rank=2, seed=2), small(modules=UNET, rank=4, seed=4)


def same(a: lm.LoRA, b: lm.LoRA) -> bool:
    """Whether two LoRAs have the same modules and ΔW."""
    return set(a) == set(b) and all(np.allclose(a[m].delta(), b[m].delta(), rtol=1e-4, atol=1e-7) for m in a)


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors"])
@pytest.mark.parametrize("way", [(OLD, NEW), (NEW, OLD)])
@pytest.mark.parametrize("step", range(6))
def test_a_directory_replaced_while_it_is_read_is_one_or_the_other(
    step: int, way: tuple[lm.LoRA, lm.LoRA], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lm.save(way[0], tmp_path / "adapter", dialect="peft")
    steps: list[str] = []

    def replacing(original: Callable[..., Any]) -> Callable[..., Any]:
        def found(path: Any, *others: Any) -> Any:
            steps.append(str(path))
            if len(steps) - 1 == step and str(path).startswith(str(folder)):
                lm.save(way[1], folder, dialect="peft")
            return original(path, *others)

        return found

    monkeypatch.setattr(reader, "open_regular", replacing(reader.open_regular))
    monkeypatch.setattr(reading, "_adapters_in", replacing(reading._adapters_in))
    monkeypatch.setattr(reading, "_config", replacing(reading._config))
    wanted = [lora.select("unet*") if name else lora for lora in way]

    try:
        with lm.open(folder / name, architecture="sdxl") as found:
            assert any(same(found, lora) for lora in wanted)
    except lm.errors.FileError as error:
        if not re.search("was replaced while it was read|No such file", str(error)):
            raise


def test_a_component_that_comes_between_two_looks_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lm.save(OLD, tmp_path / "adapter", dialect="peft")
    (folder / "text_encoder").rename(tmp_path / "apart")
    config = reading._config

    def late(path: Path) -> dict[str, Any]:
        (tmp_path / "apart").rename(folder / "text_encoder")
        return config(path)

    monkeypatch.setattr(reading, "_config", late)
    with pytest.raises(lm.errors.FileError, match="was replaced while it was read"):
        lm.open(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_writer_waits_until_another_has_taken_its_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, folder = writing._take_place, tmp_path / "adapter"
    other = threading.Thread(target=lm.save, args=(NEW, folder), kwargs={"dialect": "peft"})

    def halfway(made: Path, target: Path) -> None:
        if target == folder / reading.PEFT_CONFIG and other.ident is None:
            other.start()
            other.join(0.5)  # without the lock it would be done by then
        place(made, target)

    monkeypatch.setattr(writing, "_take_place", halfway)
    lm.save(OLD, folder, dialect="peft")
    other.join()

    assert same(lm.load(folder), NEW)


def test_several_writers_of_one_directory_all_write(tmp_path: Path) -> None:
    failed: list[str] = []

    def write(lora: lm.LoRA) -> None:
        try:
            for _ in range(8):
                lm.save(lora, tmp_path / "adapter", dialect="peft")
        except lm.errors.LoRAMergeError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=write, args=(lora,)) for lora in (OLD, NEW, OLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failed
    assert any(same(lm.load(tmp_path / "adapter"), lora) for lora in (OLD, NEW))
    assert not list(tmp_path.rglob("*.part"))


def test_a_file_that_is_replaced_while_it_is_looked_at_is_not_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lm.save(NEW, tmp_path / "x.safetensors")
    access = os.access

    def replaced(name: Path, mode: int) -> bool:
        monkeypatch.setattr(os, "access", access)
        shutil.copy(path, tmp_path / "other")
        os.replace(tmp_path / "other", path)
        return False

    monkeypatch.setattr(os, "access", replaced)
    assert writer.replaced_mode(path) == 0o777 & path.stat().st_mode


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_directory_that_is_cleared_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, cleared = scratch._lock, []

    def late(fd: int, *, wait: bool) -> bool:
        for path in tmp_path.glob("*.part") if not cleared else ():
            cleared.append(path)
            shutil.rmtree(path)
        return lock(fd, wait=wait)

    monkeypatch.setattr(scratch, "_lock", late)
    with scratch.folder(tmp_path, "x") as made:
        assert cleared
        assert made.is_dir()
    assert not list(tmp_path.iterdir())


COEFFICIENTS = Coefficients.of({UNET[0]: np.ones((2, 640), np.float32)}, [OLD, NEW], [1.0, 1.0])

PICTURES: dict[str, Callable[[Path], object]] = {
    "heat.png": lambda path: save_heatmap(lm.compare([OLD, NEW]), path),
    "heat.svg": lambda path: save_heatmap(lm.compare([OLD, NEW]), path),
    "plot.png": lambda path: draw(COEFFICIENTS, path),
    "plot.svg": lambda path: draw(COEFFICIENTS, path),
    "plot.pdf": lambda path: draw(COEFFICIENTS, path),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_written_whole_or_not_at_all(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    PICTURES[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    write = writer.pwrite

    def full(fd: int, data: memoryview, offset: int) -> int:
        if offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:100], offset)

    monkeypatch.setattr(writer, "pwrite", full)
    with pytest.raises(lm.errors.FileError, match=rf"Can't write .*{name}: No space left"):
        PICTURES[name](tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: whole}

    monkeypatch.setattr(writer, "pwrite", write)
    PICTURES[name](tmp_path / name)
    assert (tmp_path / name).read_bytes() == whole


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [lm.save(NEW, tmp_path / f"{i}.safetensors", dialect="kohya") for i in range(3)]
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "no.safetensors")
    lm.save(OLD, tmp_path / "adapter", dialect="peft")
    return [*found, tmp_path / "adapter"]


def opened(folder: Path) -> int:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # that of the listing itself
            continue
    return sum(link.startswith(str(folder)) for link in links)


def tried(work: Callable[[], object]) -> None:
    with pytest.raises(lm.errors.LoRAMergeError):
        work()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(
    "work",
    [
        lambda paths: [lm.open(path) for path in paths],
        lambda paths: [lm.open(path)[UNET[0]] for path in paths],
        lambda paths: lm.plan(paths),
        lambda paths: lm.plan(paths).lora().layout(UNET[0]),
        lambda paths: lm.merge(paths),
        lambda paths: lm.compare(paths[:2]),
        lambda paths: tried(lambda: lm.open(paths[0].with_name("no.safetensors"))),
        lambda paths: tried(lambda: lm.plan([*paths, paths[0].with_name("no.safetensors")])),
        lambda paths: tried(lambda: lm.plan(paths, weights=[1.0])),
        lambda paths: tried(lambda: lm.plan(paths, base=paths[0])),
    ],
)
def test_what_nothing_refers_to_is_closed_without_the_collector(
    work: Callable[[list[Path]], object], paths: list[Path], tmp_path: Path
) -> None:
    gc.collect()
    gc.disable()
    try:
        work(paths)
        assert opened(tmp_path) == 0
    finally:
        gc.enable()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_plan_that_fails_closes_what_it_opened_while_its_error_is_held(paths: list[Path], tmp_path: Path) -> None:
    with lm.open(paths[0]) as mine, pytest.raises(lm.errors.OptionError) as caught:
        lm.plan([mine, *paths], weights=[1.0])

    assert caught.value.__traceback__ is not None
    assert opened(tmp_path) == 0
    with lm.open(paths[0]) as mine:
        tried(lambda: lm.plan([mine, *paths], weights=[1.0]))
        assert mine[UNET[0]].norm() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(
    "derived",
    [
        lambda lora: lora.select("unet*"),
        lambda lora: lora.exclude("text*"),
        lambda lora: lora.renamed({UNET[0]: "unet.other"}),
        lambda lora: lora.part(UNET).renamed({UNET[0]: "unet.other"}),
        lambda lora: lora.shaped({m: (*layer.shape, 1, 1) for m, layer in lora.layouts.items()}),
    ],
)
def test_a_part_of_an_opened_lora_closes_its_files(
    derived: Callable[[lm.LoRA], lm.LoRA], paths: list[Path], tmp_path: Path
) -> None:
    whole = lm.open(paths[-1])
    part = derived(whole)
    assert opened(tmp_path) == 2
    kept = part.in_memory()

    part.close()

    assert opened(tmp_path) == 0
    with pytest.raises(lm.errors.FileError, match="is closed"):
        whole[UNET[0]]
    assert not kept.files
    assert kept.norm() > 0


def test_an_outcome_that_another_thread_drops_is_made_again() -> None:
    class Raced(dict[Any, Any]):
        """A cache that another thread clears whenever it has been asked whether it has something."""

        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            self.clear()
            return found

    modules = tuple(f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv")
    planned = lm.plan([small("flux", modules=modules, rank=2, seed=s) for s in (1, 2)], weights=[0.5, 0.5], rank=2)
    planned.merger.__dict__["_recent"] = Raced()

    assert planned.joins
    for module in modules * 2:
        assert planned.merger.outcome(module).layer.rank == 2


@pytest.mark.parametrize("where", ["", "sub/"])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("lora", [OLD, small(modules=TEXT)])
def test_an_adapter_on_the_hub_is_fetched_with_its_text_encoders(
    lora: lm.LoRA, named: bool, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where and not named:
        pytest.skip("a repository is named without its folders")
    snapshot, cache = tmp_path / "hub", tmp_path / "snapshots" / ("0" * 40)
    lm.save(lora, snapshot / where, dialect="peft")
    if not list((snapshot / where).glob("*.safetensors")) and named:
        pytest.skip("there is no file to name")
    (snapshot / "readme.md").write_text("")

    def fetch(reference: hub.Reference, file: str) -> Path:
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(snapshot / file, cache / file))

    monkeypatch.setattr(hub, "_fetch", fetch)
    monkeypatch.setattr(
        hub,
        "_listing",
        lambda _: [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()],
    )
    found = lm.load(f"hf://someone/lora/{where}adapter_model.safetensors" if named else "someone/lora")

    assert same(found, lora)
    assert not (cache / "readme.md").exists()
