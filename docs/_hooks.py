"""Fill in the site's pages when it is built.

A page has ``<!-- table: NAME -->`` in the place of a table that is made from the library's own data.  The copy button of
a session takes the commands alone.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from html import escape, unescape
from pathlib import Path
from typing import Any

BLOCK = re.compile(r'<div class="highlight"><pre>(.*?)</pre></div>', re.DOTALL)
MARK = re.compile(r"<!-- table: ([a-z-]+) -->")
URL = re.compile(r"(https?://[^\s,;]+)")
PAGE = re.compile(r"docs/(\S+/([\w-]+)\.md)")
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MINIATURE = [ROOT / "examples/virtual_tryon/weights/loras" / f"{name}.safetensors" for name in ("person", "jersey")]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of a page."""
    return MARK.sub(lambda match: TABLES[match[1]](), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Make the copy button of a session take what is typed, without prompts and output."""
    return BLOCK.sub(_with_commands, html)


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Publish the package's JSON Schemas."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "src" / "loramerge").glob("*/*.schema.json")):
        files.append(File.generated(config, f"schemas/{path.name}", abs_src_path=str(path)))
    return files


def _with_commands(block: re.Match[str]) -> str:
    typed = escape("\n".join(commands_of(unescape(re.sub(r"<[^>]+>", "", block[1])))))
    return block[0].replace("<div", f'<div data-copy="{typed}"', 1) if typed else block[0]


def commands_of(session: str) -> list[str]:
    """Return the lines after a prompt, and those that continue a line with a backslash at its end."""
    found: list[str] = []
    goes_on = False
    for line in session.splitlines():
        if goes_on or line.startswith("$ "):
            found.append(line.removeprefix("$ "))
        goes_on = (goes_on or line.startswith("$ ")) and line.endswith("\\")
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [[*head], ["---" for _ in head], *([*row] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def dialects() -> str:
    """List every dialect in the index."""
    from loramerge.files.dialects import DIALECTS

    rows = []
    for d in DIALECTS.values():
        writes = {"constant": "yes, one alpha per file", "keep": "yes, alpha kept", "bake": "yes, alpha baked in"}
        kinds = ", ".join(sorted(d.holds)) if d.writes else ""
        rows.append([f"`{d.name}`", d.title, writes[d.alpha] if d.writes else "no", kinds])
    return table(["name", "tools", "written", "kinds it holds"], rows)


def sources() -> str:
    """List the code that each dialect follows."""
    from loramerge.files.dialects import DIALECTS

    rows = []
    for d in DIALECTS.values():
        url, _, rest = d.source.partition(",")
        where, _, note = url.partition(" ")
        rows.append([f"`{d.name}`", f"<{where}>", f"{note}{',' if note and rest else ''}{rest}".strip()])
    return table(["name", "repository", "where"], rows)


def aliases() -> str:
    """List other names of the dialects."""
    from loramerge.files.dialects import DIALECTS

    return table(["you type", "it means"], [[f"`{a}`", f"`{name}`"] for a, name in sorted(DIALECTS.aliases.items())])


def architectures() -> str:
    """List every model family."""
    from loramerge.files.architectures import ARCHITECTURES

    names = {
        a.name: [other for other, name in ARCHITECTURES.aliases.items() if name == a.name]
        for a in ARCHITECTURES.values()
    }
    rows = [
        [f"`{a.name}`", a.title, ", ".join(f"`{n}`" for n in names[a.name]), f"{len(a.shapes)}"]
        for a in ARCHITECTURES.values()
    ]
    return table(["name", "family", "other names", "modules with a weight"], rows)


def families() -> str:
    """List what each reader takes of each family, where merges are learned, and the words of its headers."""
    from loramerge.diffusion.families import FAMILIES
    from loramerge.files.architectures import ARCHITECTURES

    rows = []
    for a in ARCHITECTURES.values():
        trainers = [f"{name}: {_code(found)}" for name in READERS[2:] if (found := _nearly(name, a.name))]
        words = [*a.label.specifications, *a.label.versions] if a.label else list(a.hints[:1])
        learned = "yes" if any(a.name in family.architectures for family in FAMILIES) else "–"
        cells = [_taken("ComfyUI", a.name), _taken("diffusers", a.name), "<br>".join(trainers) or "–"]
        rows.append([a.title, f"`{a.name}`", *cells, learned, _code(words)])
    head = ["model", "name", "ComfyUI reads", "diffusers reads", "trainers read", "learned merges", "names in headers"]
    return table(head, rows)


READERS = ("ComfyUI", "diffusers", "musubi-tuner", "sd-scripts", "ai-toolkit", "OneTrainer")


@cache
def measured() -> dict[str, Any]:
    """Read what `tools/readers` measured: by reader and family the verdicts of each of its models, by dialect."""
    return json.loads((ROOT / "docs/reference/readers.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _verdicts(reader: str, family: str) -> dict[str, Any]:
    """Return a reader's verdicts by dialect: of several models of a family that of the first."""
    models = measured()[reader]["rows"].get(family) or {"": {}}
    return next(iter(models.values()))  # type: ignore[no-any-return]


def _taken(reader: str, family: str) -> str:
    found = _verdicts(reader, family)
    whole = [d for d, (taken, modules, _) in found.items() if taken == modules and d in _named(family)]
    part = [d for d, (taken, modules, _) in found.items() if 0 < taken < modules and d in _named(family)]
    return "; ".join([_code(whole)] * bool(whole) + [f"in part {_code(part)}"] * bool(part)) or "–"


def _nearly(reader: str, family: str) -> list[str]:
    """Return the dialects of which a trainer takes all, or all but the few layers that it doesn't train."""
    found = _verdicts(reader, family)
    return [d for d in _named(family) if d in found and found[d][0] > 0.85 * found[d][1]]


def _named(family: str) -> tuple[str, ...]:
    """Return the dialects in which a family is commonly written: diffusers has one for UNets, one for all else."""
    from loramerge.files.architectures import ARCHITECTURES

    unet = ARCHITECTURES[family].denoiser == "unet"
    return ("comfyui", "kohya", *(["kohya-diffusers", "diffusers"] if unet else []), "diffusers-peft")


def measured_readers() -> str:
    """List for every family and dialect what each reader takes of a file with a LoRA on every layer."""
    from loramerge.files.architectures import ARCHITECTURES

    rows = [
        [f"`{family}`", f"`{dialect}`", *cells]
        for family in ARCHITECTURES
        for dialect in _named(family)
        if any(cells := [_cells(reader, family, dialect) for reader in READERS])
    ]
    return table(["family", "dialect", *READERS], rows)


def _cells(reader: str, family: str, dialect: str) -> str:
    """Say what a reader takes, for each of its models of a family."""
    models = measured()[reader]["rows"].get(family) or {}
    told = {model: _cell(found[dialect]) for model, found in models.items() if dialect in found}
    return "<br>".join(f"{model}: {cell}" if model else cell for model, cell in told.items())


def _cell(verdict: list[Any]) -> str:
    taken, modules, lost = verdict
    if taken == modules:
        return "whole; stops at kernels" if lost else "whole"
    how, _, named = (
        lost.partition(" at ") if lost.startswith("stops") else ("wrong" * lost.startswith("wrong"), "", lost)
    )
    names = [f"`{name}`" for name in named.removeprefix("wrong: ").split(", ")]
    told = ", ".join(names if len(names) < 5 else [*names[:3], f"and {len(names) - 3} more"])
    verb = "stops at" if how.startswith("stops") else how or "without"
    return f"{taken} of {modules}, {verb} {told}" if taken else "no"


def reader_sources() -> str:
    """List the repositories and commits that were run."""
    rows = [
        [name, f"<https://github.com/{where}>", commit, date]
        for name in READERS
        for where, commit, date in [measured()[name]["source"]]
    ]
    return table(["reader", "repository", "commit or version", "of"], rows)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"


def methods() -> str:
    """List every merge method."""
    from loramerge.merging.methods import METHODS

    rows = []
    for m in METHODS.values():
        options = ", ".join(f"`{name}`" for name in m.options) or "none"
        rows.append([f"`{m.name}`", m.title, options])
    return table(["name", "what it does", "options"], rows)


def method_gallery() -> str:
    """List every merge method with a link to its section."""
    from loramerge.merging.methods import METHODS

    return table(["method", "what it does"], [[f"[`{m.name}`](#{m.name})", m.title] for m in METHODS.values()])


def method_figures() -> str:
    """Compute what every merge method makes of the miniature's two LoRAs, the person's and the jersey's."""
    import numpy as np

    import loramerge as lm
    from loramerge.merging.methods import METHODS

    loras = [lm.load(path, architecture="sdxl") for path in MINIATURE]

    def values(lora: lm.LoRA) -> Any:
        return np.concatenate([lora[module].delta().ravel() for module in loras[0]])

    person, jersey = map(values, loras)
    average = values(lm.merge(loras, weights="uniform"))
    rows = []
    for m in METHODS.values():
        delta = values(lm.merge(loras, weights="uniform", method=m.name))
        kept = [delta @ one / (one @ one) for one in (person, jersey)]
        lengths = [np.linalg.norm(x) / np.linalg.norm(average) for x in (delta, delta - average)]
        figures = (f"{figure:.2f}" for figure in (*kept, *lengths))
        rows.append([f"[`{m.name}`](#{m.name})", *figures])
    return table(["method", "of the first", "of the second", "length", "from the average"], rows)


def method_sections() -> str:
    """Write a section for every merge method: its documentation, options and source."""
    from loramerge.merging.methods import METHODS

    return "\n\n".join(_method_section(name, METHODS) for name in METHODS)


def _method_section(name: str, index: Any) -> str:
    from loramerge.merging.rules import RULES

    method = index[name]
    text, _, raised = (inspect.getdoc(method.function) or "").partition("\n\nRaises:\n")
    refused = [entry.strip().partition(": ") for entry in re.split(r"\n(?= {4}\S)", raised) if entry.strip()]
    others = [f"`{alias}`" for alias, meant in index.aliases.items() if meant == name]
    facts = {
        "LoRAs": str(method.count or "any number"),
        "weight unless given": RULES[method.weights].text.partition(":")[0],
        "also called": ", ".join(others),
        **{f"refused with `{error}`": " ".join(why.split()) for error, _, why in refused},
        "source": PAGE.sub(r"[\2](../\1)", URL.sub(r"<\1>", method.source)),
    }
    items = "\n".join(f"- {what}: {fact}" for what, fact in facts.items() if fact)
    parts = [f"## {name}", text, items, _options(method)]
    return "\n\n".join(part for part in parts if part)


def _options(method: Any) -> str:
    rows = [[f"`{o.name}`", o.wanted, f"`{o.default}`"] for o in method.options.values()]
    return table(["option", "takes", "unless given"], rows) if rows else ""


def blocks() -> str:
    """List the blocks that each length of a vector gives numbers for."""
    from loramerge.files.architectures import ARCHITECTURES
    from loramerge.files.architectures.blocks import vectors

    families: dict[tuple[int, str], list[str]] = {}
    for a in ARCHITECTURES:
        for length, names in vectors(a).items():
            families.setdefault((length, _shortened(names)), []).append(f"`{a}`")
    rows = [[", ".join(members), str(length), names] for (length, names), members in families.items()]
    return table(["families", "numbers", "blocks, in order"], rows)


def _shortened(names: list[str]) -> str:
    """Shorten a long run of one letter to ``D00, D01, …, D18``."""
    runs: list[list[str]] = []
    for name in names:
        letters = name.rstrip("0123456789")
        if runs and runs[-1][0].rstrip("0123456789") == letters and name != letters:
            runs[-1].append(name)
        else:
            runs.append([name])
    parts = [run if len(run) <= 12 else [run[0], run[1], "…", run[-1]] for run in runs]
    return ", ".join(name for run in parts for name in run)


def readers() -> str:
    """List what each reader leaves out, by dialect."""
    from loramerge.files.architectures import ARCHITECTURES
    from loramerge.files.dialects.readers import DROPS, drops_of

    unets = {a.name for a in ARCHITECTURES.values() if a.denoiser == "unet"}
    rows = []
    own = dict.fromkeys(drop for a in ARCHITECTURES.values() for drop in drops_of(a))
    for drop in (*DROPS, *own):
        families = [] if drop.concerns(None) else [a.name for a in ARCHITECTURES.values() if drop.concerns(a)]
        all_unets = unets <= set(families)
        named = ["all UNets"] * all_unets + [f"`{name}`" for name in families if not all_unets or name not in unets]
        rows.append(
            [
                drop.reader,
                ", ".join(f"`{d}`" for d in drop.dialects),
                ", ".join(named) or "all",
                f"{drop.does} {drop.what}",
            ]
        )
    return table(["reader", "dialects", "families", "what happens"], rows)


def commands() -> str:
    """Print the help of every command."""
    from typer.testing import CliRunner

    from loramerge.cli.app import app

    runner = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    parts = []
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        text = runner.invoke(app, [name, "--help"], prog_name="loramerge").output.strip()
        parts.append(f"## loramerge {name}\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


def benchmarks() -> str:
    """Return the measured tables of every file, if there are any, with headings one level down."""
    texts = [path.read_text(encoding="utf-8").strip() for path in sorted(RESULTS.glob("*.md"), key=_order)]
    return re.sub(r"^#", "##", "\n\n".join(texts), flags=re.MULTILINE) or "Nothing has been measured yet."


COSTS = ("", "wall s", "CPU s", "wall / limit", "CPU / limit", "peak MB")
"""The measured columns of costs that a page shows."""


def costs(name: str) -> str:
    """Return the measured costs of a file beside their limits, in the columns of `COSTS`."""
    parts = []
    for section in (RESULTS / f"{name}.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, *lines = section.strip().splitlines()
        head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines if line.startswith("|"))
        if "wall / limit" in head:
            places = [head.index(column) for column in COSTS]
            parts += [f"**{title}**", table(COSTS, ([row[place] for place in places] for row in rows))]
    return "\n\n".join(parts)


def _order(path: Path) -> tuple[bool, str]:
    """Sort what everybody uses first, and learned merges last."""
    return path.stem.startswith(("composing", "learned", "miniature", "ziplora")), path.name


TABLES: dict[str, Callable[[], str]] = {
    "limits": lambda: costs("limits"),
    "big-files": lambda: costs("big"),
    "dialects": dialects,
    "dialect-sources": sources,
    "dialect-aliases": aliases,
    "architectures": architectures,
    "families": families,
    "methods": methods,
    "method-gallery": method_gallery,
    "method-figures": method_figures,
    "method-sections": method_sections,
    "block-vectors": blocks,
    "readers": readers,
    "measured-readers": measured_readers,
    "reader-sources": reader_sources,
    "commands": commands,
    "benchmarks": benchmarks,
}
