"""``loramerge doctor`` and what ``loramerge`` alone says."""

import json
import os
from importlib import metadata
from pathlib import Path

import pytest

import loramerge as lm
from loramerge.cli import doctor
from loramerge.cli.doctor import examined, healthy, self_test
from test_cli import run


def test_loramerge_alone_says_what_it_can_do_in_eight_lines() -> None:
    result = run()

    assert result.returncode == 0
    assert len(result.stdout.splitlines()) <= 8
    assert "loramerge merge a.safetensors b.safetensors -o both.safetensors" in result.stdout


def test_every_command_has_an_example_in_its_help() -> None:
    commands = run("--help").stdout.split("Commands:")[1].splitlines()
    names = [line.split()[0] for line in commands if line.startswith("  ") and line.split() and line[2] != " "]

    assert len(names) > 15
    for name in names:
        assert f"Example: loramerge {name}" in run(name, "--help").stdout, name


def test_the_doctor_reports_the_installation() -> None:
    pytest.importorskip("diffusers")  # it says that every extra is there
    result = run("doctor", "--json")

    found = json.loads(result.stdout)
    assert result.returncode == 0
    assert found["loramerge"] == lm.__version__
    assert {p["name"]: p["installed"] for p in found["packages"]}["numpy"] == metadata.version("numpy")
    assert {"torch": True, "diffusers": True, "plots": True, "search": True}.items() <= found["extras"].items()
    assert found["devices"][0].startswith("cpu")


def test_the_self_test_is_small_where_the_merge_is_right() -> None:
    assert 0 < self_test() <= doctor.TOLERANCE


def test_a_missing_package_of_the_core_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ["numpy>=2.1", "no-such-package>=3", 'nor-this; extra == "plots"']
    monkeypatch.setattr(metadata, "requires", lambda _: missing)

    found = examined()

    assert [p["status"] for p in found["packages"]] == ["ok", "missing", "missing"]
    assert found["extras"] == {"plots": False}
    assert not healthy(found)


def test_a_wrong_merge_is_not_healthy() -> None:
    found = examined()
    assert healthy(found)
    assert not healthy(found | {"largest_error": 1e-3})


def test_a_torch_that_cannot_be_imported_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    result = run("doctor", "--json")

    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["devices"] == [
        "cpu (numpy); torch can't be imported: OSError: libcudart.so.12: cannot open shared object file"
    ]


def test_a_loramerge_that_was_not_installed_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)

    with pytest.raises(lm.errors.FileError, match="was not installed"):
        examined()
