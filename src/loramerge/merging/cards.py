"""The model card of a LoRA on the Hugging Face Hub: what its file records, and nothing that it doesn't.

Source of the metadata's names: https://huggingface.co/docs/hub/model-cards.  The Hub's own code example for a LoRA loads
``base_model`` as the pipeline, so that a merge of LoRAs is an ``adapter`` of its base model where that is known, and a
``merge`` of its parents where it isn't.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from shlex import quote
from typing import Any
from urllib.parse import quote as url_path

from ..errors import LoRAMergeError, counted, first_line, size
from ..files import hub
from ..files.architectures import titles
from ..files.dialects import DIALECTS
from ..files.dialects.readers import READERS, Drop, dropped
from ..files.lora import LoRA
from ..files.metadata import RECIPE, inputs_of
from ..files.storage.texts import as_json, said
from ..files.triggers import LICENCE, PHRASE, by_parent
from .ancestry import Parent, every, parents_of
from .licences import LICENCES
from .markdown import code, fenced, plain
from .recipe import Recipe

TARGETS = {"diffusers": "diffusers", "ComfyUI": "comfyui"}
"""The dialect to convert to for each reader."""

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
"""The form of a repository's name, which a base model's path may have too: the Hub is asked."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A model card: the facts of a file, of its parents and of its caller, which `text` writes down."""

    repo: str
    lora: LoRA
    files: Mapping[str, tuple[int, str]]
    """Size in bytes and SHA-256 of every file of the LoRA, by its path in the repository."""
    base_model: str | None = None
    """The repository of the base model, as the caller says."""
    licence: str | None = None
    """The licence, as the caller says."""
    tags: Sequence[str] = ()
    pictures: Sequence[str] = ()
    """Paths of the pictures in the repository."""

    @cached_property
    def parents(self) -> tuple[Parent, ...]:
        """The LoRAs that it was made from; their repositories are asked for their licences."""
        return parents_of(self.lora.metadata)

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The record of the merge in the file's header; empty if there is none."""
        return said(self.lora.metadata.get(RECIPE))

    @property
    def file(self) -> str:
        """The path of the LoRA itself in the repository."""
        return next(iter(self.files))

    @property
    def stated_licence(self) -> str:
        """The licence that the caller or the file's header names; empty if neither does."""
        return self.licence or self.lora.metadata.get(LICENCE, "")

    @cached_property
    def base(self) -> str | None:
        """The base model's repository: as given, as the file names it, or as the cards of all parents do."""
        if self.base_model:
            return self.base_model
        named = {self.lora.metadata.get(key, "") for key in ("ss_sd_model_name", "base_model")}
        named |= {str(config.get("base_model_name_or_path", "")) for config in self.lora.about.values()}
        there = [n for n in sorted(named) if REPOSITORY.fullmatch(n) and hub.facts(hub.Reference(n, None, None))]
        if there:
            return there[0]
        bases = {parent.bases for parent in self.parents}
        return next(iter(bases))[0] if len(bases) == 1 and len(next(iter(bases))) == 1 else None

    def text(self) -> str:
        """Return the card as Markdown, with the Hub's metadata in front."""
        parts = [
            f"---\n{self._metadata()}\n---",
            f"# {plain(self.repo.partition('/')[2])}",
            self._summary(),
            "\n".join(f"![{plain(PurePosixPath(path).stem)}]({url_path(path)})" for path in self.pictures),
            _section("Trigger words", self._words()),
            _section("Parents", _listed(self.parents)),
            _section("How it was made", self._made()),
            _section("Use in diffusers", self._in_diffusers()),
            _section("Use in ComfyUI", self._in_comfyui()),
            _section("The file", self._files()),
            _section("Licence", self._licence()),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def notes(self) -> list[str]:
        """Return what the card can't say, and which argument would say it."""
        found = []
        if self.base is None:
            found.append("the card names no base model; --base-model org/name (base_model=) does")
        if not self.stated_licence:
            found.append("the card states no licence; --license NAME (license=) does, as the parents' licences allow")
        unknown = sum(not parent.is_known for parent in every(self.parents))
        return [*found, *[f"the licence of {unknown} of the LoRAs that it was made from is unknown"] * bool(unknown)]

    def _metadata(self) -> str:
        """Return the YAML that the Hub reads."""
        from huggingface_hub import ModelCardData

        repos = list(dict.fromkeys(p.reference.repo for p in self.parents if p.reference))
        all_there = len(self.parents) > 1 and all(p.reference for p in self.parents)
        relation: dict[str, Any] = {"base_model": self.base, "base_model_relation": "adapter"} if self.base else {}
        if not self.base and all_there and len(repos) > 1:
            relation = {"base_model": repos, "base_model_relation": "merge"}
        library = "peft" if self.lora.dialect == "peft" else "diffusers" if self._stop("diffusers") is None else None
        families = self.lora.families if len(self.lora.families) == 1 else ()
        tags = [*["diffusers"] * (library == "diffusers"), "lora", *["merge"] * (len(self.parents) > 1), "loramerge"]
        phrase = " ".join(self.lora.metadata.get(PHRASE, "").split())
        entries: dict[str, Any] = {**_licence_entries(self.stated_licence), **relation}
        entries |= {"instance_prompt": phrase} if phrase else {}
        return ModelCardData(library_name=library, tags=[*tags, *families, *self.tags], **entries).to_yaml()

    def _summary(self) -> str:
        family = titles(self.lora.families) or "a model whose family is not known"
        made = f"merged from {len(self.parents)} LoRAs" if len(self.parents) > 1 else "made from another LoRA"
        by = f", {made} by loramerge" if self.parents else ""
        on = (
            f" Its base model is {_link(hub.Reference(self.base, None, None))}."
            if self.base
            else " Its base model is not recorded."
        )
        return f"A LoRA for {plain(family)}{by}.{on}"

    def _words(self) -> str:
        found = by_parent(self.lora.name, self.lora.metadata)
        lines = [f"- {', '.join(map(code, words))}, of {code(name)}" for name, words in found if words]
        tagged = any(words for _, words in found) and not self.lora.metadata.get(PHRASE)
        note = "The files name no trigger phrase; these are the most frequent tags of their training captions."
        return "\n".join([*[note, ""] * tagged, *lines])

    def _made(self) -> str:
        if not self.record:
            return ""
        if not inputs_of(self.record):
            return f"The file's header records:\n\n{fenced('json', as_json(self.record, 2))}"
        facts = {
            "method": self.record.get("method"),
            "options": _pairs(self.record.get("options")),
            "rule for the weights": self.record.get("weights"),
            "rank": self.record.get("rank"),
            "budget": _pairs(self.record.get("budget")),
            "base of DoRA layers": self.record.get("base"),
            "loramerge": self.record.get("loramerge"),
        }
        lines = [f"- {name}: {code(str(value))}" for name, value in facts.items() if value]
        return "\n".join([*lines, "", *self._recipe()])

    def _recipe(self) -> list[str]:
        try:
            recipe = Recipe.of(self.lora)
            text = recipe.to_toml()
        except LoRAMergeError as error:
            reason = first_line(error).partition(" Way")[0]
            bare = {**self.record, "inputs": [_bare(entry) for entry in inputs_of(self.record)]}
            return [plain(reason), "", fenced("json", as_json(bare, 2))]
        to = recipe.output.to or self.lora.dialect
        target = "adapter" if to == "peft" else PurePosixPath(self.file).name
        command = code(f"loramerge merge recipe.toml -o {quote(target)}")
        gives = "these tensors again" if to == self.lora.dialect else f"the same LoRA again, in the dialect {code(to)}"
        return [f"With the same files, {command} gives {gives}:", "", fenced("toml", text)]

    def _stop(self, reader: str) -> str | None:
        """Say why a reader takes nothing of the file; None if it takes at least a part."""
        if self.lora.dialect not in READERS[reader].dialects:
            return f"Whether {reader} reads the dialect {self.lora.dialect} is not known"
        if self.lora.architecture is None:
            return f"Whether {reader} reads it is not known, because the model's family isn't"
        all_of_it = len(self.lora)
        stops = [
            f"{reader} {d.does} {d.what}"
            for d, m in self._dropped(reader)
            if d.does != "ignores" or len(m) == all_of_it
        ]
        return "; ".join(stops) or None

    def _ignored(self, reader: str) -> list[str]:
        """Say what a reader leaves out of the file."""
        return [f"{reader} ignores {d.what}: {len(m)} of {len(self.lora)} layers." for d, m in self._dropped(reader)]

    def _dropped(self, reader: str) -> list[tuple[Drop, list[str]]]:
        """Return the parts of the file that a reader is known to leave out, each with its modules."""
        rows = dropped(self.lora.dialect, self.lora.architecture, self.lora.layouts)
        return [(drop, modules) for drop, modules in rows if drop.reader == reader]

    def _convert(self, reader: str) -> str:
        """Say why a reader takes nothing, and the way out, which a file of an unknown family may not have."""
        why = f"{plain(str(self._stop(reader)))}."
        if self.lora.architecture is None:
            return why
        target = TARGETS[reader]
        source = self.repo if self.lora.dialect == "peft" else f"{self.repo}/{self.file}"
        command = f"loramerge convert {quote(source)} -o for-{target}.safetensors --to {target}"
        return f"{why} Convert the file first:\n\n{fenced('sh', command)}"

    def _in_diffusers(self) -> str:
        unknown = 'base_model = "…"  # the file does not record it\n'
        where, given = (f'"{self.base}"', "") if self.base else ("base_model", unknown)
        if self.lora.dialect == "peft":
            loaded = f'model = PeftModel.from_pretrained(pipe.{self._denoiser()}, "{self.repo}")'
            lines = f"from diffusers import DiffusionPipeline\nfrom peft import PeftModel\n\n{given}"
            return fenced("py", f"{lines}pipe = DiffusionPipeline.from_pretrained({where})\n{loaded}")
        if self._stop("diffusers"):
            return self._convert("diffusers")
        snippet = (
            f"from diffusers import DiffusionPipeline\n\n{given}pipe = DiffusionPipeline.from_pretrained({where})\n"
            f'pipe.load_lora_weights("{self.repo}", weight_name={as_json(self.file)})'
        )
        return "\n\n".join([fenced("py", snippet), *self._ignored("diffusers")])

    def _denoiser(self) -> str:
        """Return the component that the adapter is for: the denoiser, unless it is for text encoders alone."""
        return min(self.lora, key=lambda module: module.startswith("text_encoder")).partition(".")[0]

    def _in_comfyui(self) -> str:
        if self._stop("ComfyUI"):
            return self._convert("ComfyUI")
        put = f"Put {code(self.file)} into `ComfyUI/models/loras`, and choose it in the node *Load LoRA*."
        return "\n\n".join([put, *self._ignored("ComfyUI")])

    def _files(self) -> str:
        title = DIALECTS[self.lora.dialect].title
        lines = [
            f"- dialect: {self.lora.dialect} ({plain(title)})",
            f"- {counted(len(self.lora), 'module')}, {self.lora.summary('rank')}",
            *(f"- {code(name)}: {size(length)}, SHA-256 `{digest}`" for name, (length, digest) in self.files.items()),
            f"- SHA-256 of the tensors alone: `{self.lora.sha256}`",
        ]
        return "\n".join(lines)

    def _licence(self) -> str:
        if self.licence:
            own = f"This file: {code(self.licence)}."
        elif self.stated_licence:
            own = f"This file: {code(self.stated_licence)}, says its header."
        else:
            own = "No licence is stated for this file."
        unknown = [code(p.name) for p in every(self.parents) if not p.is_known]
        of = f" The licence of {', '.join(dict.fromkeys(unknown))} is unknown: ask its author before you rely on this file."
        return own + of * bool(unknown)


def _licence_entries(licence: str) -> dict[str, str]:
    """Return the Hub's entries for a licence: its name there, or ``other`` and the name that it has elsewhere."""
    if not licence:
        return {}
    if licence in LICENCES:
        return {"license": licence}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.+]+", "-", licence.lower()).strip("-") or "other"}


def _pairs(entries: Any) -> str:
    """Return a table of a record in one line; a record may have anything in its place."""
    return ", ".join(f"{name} = {value}" for name, value in entries.items()) if isinstance(entries, dict) else ""


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _listed(parents: Iterable[Parent], indent: str = "") -> str:
    """Return a list of parents, each with its own parents below it."""
    return "\n".join(line for parent in parents for line in _lines(parent, indent))


def _lines(parent: Parent, indent: str) -> Iterator[str]:
    where = f"{code(parent.name)}, a file that is not on the Hub"
    if parent.reference:
        where = _link(parent.reference) + ("" if parent.reference.file else f", {code(parent.name)}")
    licence = " and ".join(map(code, parent.licences)) or "**unknown**" + _why_unknown(parent)
    digest = f"; SHA-256 of its tensors {code(parent.sha256)}" if parent.sha256 else ""
    yield f"{indent}- {where}; weight {code(parent.weight)}; licence {licence}{digest}"
    if parent.parents:
        yield f"{indent}  It was merged itself, from:"
        yield _listed(parent.parents, indent + "  ")


def _why_unknown(parent: Parent) -> str:
    if parent.reference is None:
        return ", its header names none"
    return ", its repository names none" if parent.asked else ", its repository could not be read"


def _link(reference: hub.Reference) -> str:
    name = f"{reference.repo}/{reference.file}" if reference.file else reference.repo
    return f"[{code(name)}](<{hub.address(reference)}>)"


def _bare(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's entry without the parent's own metadata."""
    return {key: value for key, value in entry.items() if key != "metadata"}
