"""Run a whole study by one command, ``python -m examples.virtual_tryon run``."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loramerge.errors import LoRAMergeError, OptionError

from . import bases, leaderboard, loras, scores, stages
from .job import Job
from .protocol import FAMILIES, STUDY, Protocol, Scorer, located
from .reading import PRESETS, preset, read


def main(given: Sequence[str] | None = None) -> int:
    """Run the command; return 1 after an error and 130 after an interruption."""
    options = _parser().parse_args(sys.argv[1:] if given is None else given)
    try:
        if options.command == "leaderboard":
            return _leaderboard(options)
        job = job_of(options)
        stages.run(job, only=options.only, processes=options.processes, say=_say)
    except (LoRAMergeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    if not options.only or "report" in options.only:
        _say(f"→ {job.out / 'report.html'}")
    return 0


def _leaderboard(options: argparse.Namespace) -> int:
    """Rank loramerge's merge methods, and those that the options name."""
    entries = [*leaderboard.ENTRIES, *map(leaderboard.of_ones_own, options.method)]
    given = changed(read(preset("mini")), options)
    bases.check(given.base)
    scores.check(given.scorer)
    made = leaderboard.protocol(given, entries, repeats=options.repeats, seeds=given.drawing.seeds)
    out = (options.out or Path("build/study") / "leaderboard").expanduser()
    job = Job(protocol=made, out=out, families=(leaderboard.FAMILY,))
    kept = [stage for stage in stages.STAGES if stage.name != "report"]
    stages.run(job, processes=options.processes, say=_say, stages=[*kept, stages.NOISE])
    for path in leaderboard.write(job, entries):
        _say(f"→ {path}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.virtual_tryon", description="The virtual try-on study.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    run = commands.add_parser("run", help="train, merge, generate, score, report; what is done is not done again")
    add = run.add_argument
    known = ", ".join(sorted(file.stem for file in PRESETS.glob("*.toml")))
    one = run.add_mutually_exclusive_group().add_argument
    one("--preset", default="mini", help=f"{known} (default: %(default)s)")
    one("--protocol", type=Path, metavar="TOML", help="a protocol of your own, instead of a preset")
    add("--out", type=Path, help="(default: build/study/ and the name of the preset, or of the protocol's file)")
    add("--only", action="append", default=[], choices=stages.NAMES, help="run only this stage (repeatable)")
    add("--seeds", type=int, help="pictures of each prompt and setting (default: the protocol's)")
    add(
        "--extended",
        nargs="*",
        choices=FAMILIES[1:],
        metavar="WHAT",
        help=f"more settings than the study's: {', '.join(FAMILIES[1:])}; all of them by default",
    )
    add(
        "--processes",
        type=int,
        default=1,
        help="processes to train and draw with, one thread each (default: %(default)s)",
    )
    add("--device", help="cpu or cuda (default: cpu for the miniature, else cuda where there is one)")
    add("--base", help="base model instead of the protocol's: a directory, or a name on the Hub")
    add("--variant", help="which of the base's files, such as fp16, which are half as large")
    add("--scorer", help="encoder instead of the protocol's")
    add("--second-scorer", help="another encoder of DINOv2's architecture, whose scores stand beside the scorer's")
    add(
        "--data", type=Path, metavar="DIRECTORY", help="directory that holds a folder of captioned pictures per concept"
    )
    ranked = commands.add_parser("leaderboard", help="rank merge methods on eight pairs of LoRAs with a known truth")
    add = ranked.add_argument
    add(
        "--method",
        action="append",
        default=[],
        metavar="my.py",
        help="a method of your own: my.py, or package.module:name",
    )
    add("--out", type=Path, help="(default: build/study/leaderboard)")
    add("--seeds", type=int, default=4, help="pictures of each prompt and merge (default: %(default)s)")
    add("--repeats", type=int, default=2, help="trainings of each LoRA (default: %(default)s)")
    add("--processes", type=int, default=1, help="(default: %(default)s)")
    ranked.set_defaults(base=None, variant=None, scorer=None, second_scorer=None, data=None)
    return parser


def job_of(options: argparse.Namespace) -> Job:
    """Make the job that the options ask for, checked before any work is done.

    Raises:
        OptionError: An option is invalid.
        FileError: The protocol, the base, the scorer or a LoRA of one's own is missing.
    """
    protocol = changed(read(options.protocol or preset(options.preset)), options)
    extended = options.extended
    families = (STUDY, *(FAMILIES[1:] if extended == [] else extended or ()))
    device = options.device or _device(protocol)
    if options.processes < 1 or (options.processes > 1 and device != "cpu"):
        raise OptionError(f"--processes {options.processes}: one, or several on a CPU; the device is {device}.")
    bases.check(protocol.base)
    scores.check(protocol.scorer)
    out = options.out or Path("build/study") / protocol.name
    job = Job(protocol=protocol, out=out.expanduser(), families=families, device=device)
    for lora in loras.given(job):
        lora.close()
    return job


def changed(protocol: Protocol, options: argparse.Namespace) -> Protocol:
    """Override the protocol with the command line's options."""
    if options.seeds is not None:
        if options.seeds < 1:
            raise OptionError(f"--seeds {options.seeds}: wanted one or more; intervals need five.")
        protocol = replace(protocol, drawing=replace(protocol.drawing, seeds=options.seeds))
    if options.base:
        protocol = replace(protocol, base=replace(protocol.base, model=located(options.base, Path.cwd())))
    if options.variant:
        if protocol.base.miniature:
            raise OptionError(f"--variant {options.variant}: the miniature has no other files. Way out: without it.")
        protocol = replace(protocol, base=replace(protocol.base, variant=options.variant))
    if options.scorer:
        protocol = replace(protocol, scorer=replace(protocol.scorer, model=located(options.scorer, Path.cwd())))
    if options.second_scorer:
        protocol = replace(protocol, second=Scorer(model=located(options.second_scorer, Path.cwd())))
    if options.data:
        if protocol.data.source != "folders":
            raise OptionError(
                f"--data {options.data}: the pictures of {protocol.name!r} are drawn, not read from folders."
            )
        protocol = replace(protocol, data=replace(protocol.data, folder=str(options.data)))
    return protocol


def _device(protocol: Protocol) -> str:
    if protocol.base.miniature:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
