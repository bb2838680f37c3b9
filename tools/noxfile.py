"""Test which Pythons and which versions of the libraries work: the wheel in an environment of its own, and the tests.

    pip install 'nox[uv]'
    nox -f tools/noxfile.py -k lowest -p 3.11    # what pyproject.toml allows at least
    nox -f tools/noxfile.py -k newest -p 3.13    # what the registry has: run it every night
    nox -f tools/noxfile.py -s 'core-3.12(tested)' -- tests/test_layers.py    # constraints.txt, and these tests alone

`core` has the core's dependencies, without torch, and runs every test that needs no more.  `extras` has the extras too,
which ask for newer versions of some, and tests what they are for.  If a newest version breaks something, each library goes back to its tested version by
itself to find the one that did it.
"""

import re
from pathlib import Path

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).parents[1]
VERSIONS = {
    "lowest": ("--resolution", "lowest-direct"),
    "tested": ("--constraint", "constraints.txt"),
    "newest": ("--upgrade",),
}
EXTRAS = ("--extra", "diffusers", "--extra", "plots", "--extra", "search")
LIBRARIES = ("numpy", "safetensors", "huggingface-hub", "torch", "diffusers", "peft", "transformers", "accelerate")
GROUPS = {
    "core": ("tests/test_merge.py", "tests/test_methods.py", "tests/test_layers.py", "tests/test_files.py"),
    "more": ("tests/test_dialects.py", "tests/test_checkpoints.py", "tests/test_bake.py", "tests/test_recipe.py"),
    "command line": ("tests/test_cli.py",),
    "learned": ("tests/learned/test_ziplora.py", "tests/learned/test_least_squares.py", "tests/learned/test_state.py"),
    "doctor": ("tests/test_doctor.py",),
    "peft": ("tests/oracles/test_peft.py", "tests/oracles/test_peft_methods.py"),
    "diffusers": ("tests/oracles/test_diffusers.py", "tests/adapters/test_generation.py"),
    "base models": ("tests/oracles/test_base_models.py", "tests/adapters/test_models.py"),
    "dinov2": ("tests/adapters/test_real_encoders.py", "tests/adapters/test_scoring.py"),
    "training": ("tests/adapters/test_training.py",),
}

nox.options.default_venv_backend = "uv"
nox.options.envdir = ROOT / "build/nox"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ()  # nothing unless asked for: most rows download a PyTorch

rows = nox.parametrize("versions", [nox.param(name, id=name) for name in VERSIONS])


@nox.session(python=["3.11", "3.12", "3.13"])
@rows
def core(session: nox.Session, versions: str) -> None:
    """Test the core alone."""
    prepare(session, versions)
    session.env["LORAMERGE_TESTS"] = "core"  # what needs more is left out
    test(session, {"core": ("tests",)}, versions)


@nox.session(python=["3.11", "3.12", "3.13"])
@rows
def extras(session: nox.Session, versions: str) -> None:
    """Test what the extras are for."""
    prepare(session, versions, *EXTRAS)
    session.install("lycoris-lora", "jaxtyping", "beartype")  # an oracle of the tests for base models; checks of shapes
    test(session, GROUPS, versions)


def prepare(session: nox.Session, versions: str, *extras: str) -> None:
    """Install the dependencies, the wheel, and what the tests use."""
    session.chdir(ROOT)
    session.env["PYTHONDONTWRITEBYTECODE"] = "1"
    session.install("--requirement", "pyproject.toml", *extras, *VERSIONS[versions])
    session.install("--no-deps", "--reinstall-package", "loramerge", ".")  # uv would take an older build
    pins = VERSIONS[versions] if versions == "tested" else ()
    session.install("pytest", "hypothesis", "pillow", *pins)


def test(session: nox.Session, groups: dict[str, tuple[str, ...]], versions: str) -> None:
    """Run every group of tests, or those named after ``--``; say which break, and by which newest version."""
    session.log(" ".join(f"{name} {version}" for name, version in installed(session).items()))
    broken = []
    for name, paths in {"asked for": tuple(session.posargs)}.items() if session.posargs else groups.items():
        if not passes(session, paths):
            broken.append(f"{name} ({culprit(session, paths)})" if versions == "newest" else name)
    if broken:
        session.error(f"broken: {', '.join(broken)}")


def passes(session: nox.Session, paths: tuple[str, ...]) -> bool:
    try:
        session.run("pytest", "-p", "no:cacheprovider", *paths)
    except CommandFailed:
        return False
    return True


def culprit(session: nox.Session, paths: tuple[str, ...]) -> str:
    """Name the library without whose newest version the tests pass."""
    tested = pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    for name, version in installed(session).items():
        if version != tested[name]:
            session.install(f"{name}=={tested[name]}")
            mended = passes(session, paths)
            session.install(f"{name}=={version}")
            if mended:
                return f"{name} {version} breaks it, {tested[name]} does not"
    return "no single library's newest version: it fails with each one put back too"


def installed(session: nox.Session) -> dict[str, str]:
    found = pinned(str(session.run("uv", "pip", "freeze", external=True, silent=True)))
    return {name: found[name] for name in LIBRARIES if name in found}


def pinned(text: str) -> dict[str, str]:
    """Return the version of every package in a list of ``name==version``, under normalised names."""
    pins = re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins}
