"""The process is the user's: its umask, its children, its signals and its standard streams."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import loramerge as lm
from loramerge.files.storage.header import Awaited
from small import MODULES, small

if sys.platform == "win32":
    pytest.skip("signals, modes and forks of Unix", allow_module_level=True)

WORDS = ("merge", "a.safetensors", "b.safetensors", "-o", "out/m.safetensors", "-m", "ties", "-r", "2")
HALF = "Interrupted; nothing was written.\n"

SLOW = """
import pathlib, sys, time
from loramerge.files.storage import writer
def halt(*_):
    pathlib.Path("half").touch()
    time.sleep(60)
writer._write_group = halt
from loramerge.cli import main
main()
"""
"""The command line, halted where it has written half of a file."""


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Have processes answer Ctrl-C, which a shell makes its background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for i, name in enumerate("ab"):
        lm.save(small(modules=MODULES["sdxl"][:2], seed=i), tmp_path / f"{name}.safetensors", dialect="kohya")
    (tmp_path / "out").mkdir()
    (tmp_path / "recipe.toml").write_text('[[loras]]\npath = "a.safetensors"\n')
    return tmp_path


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o000])
def test_a_new_file_has_the_mode_that_the_umask_asks_for(
    mask: int, tmp_path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)

    files = [lm.save(small(), tmp_path / "x.safetensors"), lm.save(small(), tmp_path / "p", dialect="peft")]

    found = [path for file in files for path in (file, *file.rglob("*")) if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o666 & ~mask}
    assert umask(mask) == mask


def test_a_file_keeps_its_mode_while_it_is_replaced_too(tmp_path: Path, umask: Callable[[int], int]) -> None:
    path = lm.save(small(), tmp_path / "x.safetensors")
    path.chmod(0o600)
    seen: set[int] = set()

    lm.save(
        small(seed=1),
        path,
        progress=lambda *_: seen.update(stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()),
    )

    assert seen == {0o600}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_saving_in_threads_leaves_the_umask_alone(tmp_path: Path, umask: Callable[[int], int]) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-9)
    modes: list[int] = []

    def work(name: str) -> None:
        for _ in range(20):
            path = lm.save(lora, tmp_path / name)
            modes.append(stat.S_IMODE(path.stat().st_mode))
            path.unlink()

    lora = small(modules=MODULES["sdxl"][:1], rank=1)
    threads = [threading.Thread(target=work, args=(f"{i}.safetensors",)) for i in range(6)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)

    assert set(modes) == {0o644}
    assert umask(0o022) == 0o022


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_workers_end_with_the_item_at_which_their_parent_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"""
import os, time
from loramerge.files.storage import workers
workers.cores = lambda: 2
def work(item):
    fd = os.open({str(log)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{{os.getpid()}}\\n".encode())
    time.sleep(0.05)
list(workers.each(range(400), work, 2))
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    while len(set(lines(log))) < 3:
        time.sleep(0.01)
    parent.send_signal(number)
    parent.wait()
    before, children = len(lines(log)), set(lines(log)) - {str(parent.pid)}

    while any(running(int(child)) for child in children):
        time.sleep(0.01)
    assert len(lines(log)) <= before + 2


@pytest.mark.parametrize("number", ["signal.SIGHUP", "signal.SIGINT"])
def test_a_worker_leaves_what_goes_to_the_whole_group_to_its_parent(number: str) -> None:
    code = f"""
import os, signal
from loramerge.files.storage import workers
workers.cores = lambda: 2
parent = os.getpid()
def work(item):
    if os.getpid() != parent:
        os.kill(os.getpid(), {number})
assert len(list(workers.each(range(20), work, 2))) == 20
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (found.returncode, found.stderr) == (0, "")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_there_are_no_more_workers_than_cores(tmp_path: Path) -> None:
    code = f"""
import os, time
from loramerge.files.storage import workers
workers.cores = lambda: 2
def work(item):
    open({str(tmp_path)!r} + f"/{{os.getpid()}}", "w").close()
    time.sleep(0.01)
assert len(list(workers.each(range(100), work, 999_999))) == 100
"""
    subprocess.run([sys.executable, "-c", code], check=True)

    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("action", "count"), [("signal.SIG_IGN", "2"), ("signal.SIG_IGN", "999999"), ("lambda *_: os.wait()", "2")]
)
def test_a_parent_that_ignores_its_children_merges_all_the_same(action: str, count: str, here: Path) -> None:
    code = f"""
import os, signal, sys
signal.signal(signal.SIGCHLD, {action})
from loramerge.cli import main
main()
"""
    found = subprocess.run([sys.executable, "-c", code, *WORDS, "-q", "-j", count], cwd=here, capture_output=True)

    assert (found.returncode, found.stderr) == (0, b"")
    assert lm.load(here / "out" / "m.safetensors")


def halted(here: Path, words: tuple[str, ...], before: str = "") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", before + SLOW, *words]
    found = subprocess.Popen(
        command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (here / "half").exists():
        assert found.poll() is None, found.communicate()
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("count", ["1", "2"])
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, ""), (signal.SIGINT, 130, HALF)],
)
def test_a_signal_leaves_nothing_half_written(
    number: signal.Signals, code: int, said: str, count: str, here: Path
) -> None:
    found = halted(here, (*WORDS, "-j", count))

    os.killpg(found.pid, number)

    _, error = found.communicate()
    assert (found.returncode, error) == (code, said)
    assert not list((here / "out").iterdir())


def test_a_hangup_that_is_ignored_is_ignored(here: Path) -> None:
    found = halted(here, WORDS, "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")

    found.send_signal(signal.SIGHUP)

    with pytest.raises(subprocess.TimeoutExpired):
        found.wait(0.5)
    found.kill()
    found.communicate()


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "a.safetensors", "-o", "out/x.safetensors", "--to", "comfyui"),
        ("convert", "a.safetensors", "-o", "out/x", "--to", "peft"),
        ("resize", "a.safetensors", "-o", "out/x.safetensors", "-r", "1"),
    ],
)
def test_every_command_says_the_same_after_ctrl_c(words: tuple[str, ...], here: Path) -> None:
    found = halted(here, words)

    found.send_signal(signal.SIGINT)

    _, error = found.communicate()
    assert (found.returncode, error) == (130, HALF)
    assert not [path for path in (here / "out").rglob("*") if path.is_file()]


def test_a_sweep_says_that_it_can_be_gone_on_with(here: Path) -> None:
    found = halted(here, ("sweep", "recipe.toml", "--set", "rank=1,2", "-o", "out"))

    found.send_signal(signal.SIGINT)

    _, error = found.communicate()
    assert (found.returncode, error) == (
        130,
        "Interrupted; what was merged is kept, and the same command goes on from there.\n",
    )


@pytest.mark.parametrize(
    "module", ["typer", "numpy", "loramerge.cli.output", "loramerge.cli.merge", "loramerge.merging.recipe"]
)
def test_ctrl_c_while_the_command_is_loaded_is_answered_too(module: str, here: Path) -> None:
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
from loramerge.cli import main
main()
"""
    found = subprocess.run([sys.executable, "-c", code, *WORDS], cwd=here, capture_output=True, text=True)

    assert (found.returncode, found.stdout, found.stderr) == (130, "", HALF)


def shell(command: str, here: Path, buffered: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run a command of bash, in which ``lm`` is ours."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    script = f'set -o pipefail; lm() {{ "{sys.executable}" -m loramerge "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", script],
        cwd=here,
        capture_output=True,
        text=True,
        env=environment if buffered else {**environment, "PYTHONUNBUFFERED": "1"},
    )


MERGE = " ".join(WORDS)


@pytest.mark.parametrize("command", ["inspect a.safetensors", "--help", MERGE])
def test_a_closed_output_is_no_error(command: str, here: Path) -> None:
    found = shell(f"lm {command} >&-", here)

    assert (found.returncode, found.stderr) == (0, "")
    if command == MERGE:
        assert lm.load(here / "out" / "m.safetensors")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", ["inspect a.safetensors", "--help", MERGE])
def test_a_full_output_is_one_line_and_an_exit_code(command: str, buffered: bool, here: Path) -> None:
    found = shell(f"lm {command} >/dev/full", here, buffered)

    assert found.returncode == 1
    assert found.stderr.startswith("Error: Can't write to standard output: No space left on device. The command")
    assert found.stderr.count("\n") == 1
    if command == MERGE:
        assert ("work is done" in found.stderr) == (here / "out" / "m.safetensors").exists()


def test_an_output_whose_reader_is_gone_is_141(here: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    for command in (["methods"], ["--help"], ["inspect", "a.safetensors"], list(WORDS)):
        words = [sys.executable, "-m", "loramerge", *command]
        found = subprocess.run(words, cwd=here, stdout=write, stderr=subprocess.PIPE, text=True)
        assert (found.returncode, found.stderr) == (141, "")


def test_errors_never_go_to_the_output(here: Path) -> None:
    for command in ("inspect nope.safetensors", "merge nope.safetensors -o x.safetensors", "merge --nope", "nope"):
        found = shell(f"lm {command} 2>&-", here)

        assert (found.returncode > 0, found.stdout) == (True, "")


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_not_taken_for_the_files_that_are_opened_next(closed: str, here: Path) -> None:
    assert shell(f"lm {MERGE} {closed}", here).returncode == 0
    assert lm.load(here / "out" / "m.safetensors")


def test_an_interrupt_at_the_start_of_a_thread_leaves_none_that_the_process_would_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, start = {*threading.enumerate()}, threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        Awaited({}, "slow", "draft", lambda: "text").begin()

    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in left)
    assert caught.tb  # which holds on to the executor, as an error on its way out of the process does
