"""The layout of the page, in gradio: which choice is where, and which function of `work` each button calls."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...files.dialects import DIALECTS
from ...merging import RULES
from ...merging.methods import METHODS
from . import work
from .choices import ALLOW, EXACT, FITS
from .shelf import Entry, Shelf, listed

LIMITS = {
    "rank": ("16", "The rank of every module."),
    "size": ("150MB", "The size of the file."),
    "error": ("1%", "The error of all modules together."),
    "energy": ("99.9%", "The share of the energy that stays."),
}
"""An example of a limit, and what it limits."""

FIELDS = ("rule", "method", "options", "fit", "limit", "to", "dtype", "exclude", "base", "allow")
"""The fields of `Choices` that have a control of their own, in the order of these."""

PROGRESS = gr.Progress()
"""The default of a parameter that gradio gives a bar to."""


class Page:
    """The page, for any number of visitors at once.

    Args:
        root: The folder in which everything is stored.
        folders: The folders of which paths are read.
    """

    def __init__(self, root: Path, folders: Sequence[Path] = ()) -> None:
        self.root, self.folders = root, folders
        self.shelves: dict[str, Shelf] = {}
        with gr.Blocks(title="loramerge", analytics_enabled=False, delete_cache=(600, 3600)) as self.blocks:
            gr.HTML("<h1>Merge LoRAs</h1><p>Drop LoRAs of any tools, set how strong each is, merge, download.</p>")
            self.listed, self.touched = gr.State(0), gr.State(0)
            with gr.Row(elem_classes="columns"):
                with gr.Column(scale=5, min_width=340):
                    self._loras()
                with gr.Column(scale=6, min_width=340):
                    controls = self._controls()
                    self._results(controls)
            self.blocks.unload(self._leave)

    def shelf(self, request: gr.Request) -> Shelf:
        """Return the files of the visitor who asks."""
        key = request.session_hash or ""
        if key not in self.shelves:
            self.shelves[key] = Shelf(self.root, self.folders)
        return self.shelves[key]

    def _leave(self, request: gr.Request) -> None:
        """Delete the files of a visitor who has closed the page."""
        if shelf := self.shelves.pop(request.session_hash or "", None):
            shelf.clear()

    def _loras(self) -> None:
        """Lay out where LoRAs come from, and a card for each."""
        gr.HTML("<h2>1. LoRAs</h2>")
        drop = gr.File(label="LoRA files, of any tool", file_count="multiple", height=130, elem_id="drop")
        with gr.Row(elem_classes="name"):
            label = "or a name on the Hugging Face Hub" + (", or a path in the given folders" if self.folders else "")
            name = gr.Dropdown(
                listed(self.folders), value=None, label=label, allow_custom_value=True, scale=4, elem_id="name"
            )
            add = gr.Button("Add", scale=1, min_width=80, elem_id="add")
        problem = gr.HTML(elem_id="problem", padding=False)

        def dropped(files: Any, count: int, request: gr.Request) -> tuple[None, str, int]:
            given = [(str(f.get("path")), str(f.get("orig_name"))) for f in files or [] if isinstance(f, dict)]
            return None, work.added(self.shelf(request), given), count + 1

        def searched(text: Any, count: int, request: gr.Request) -> tuple[None, str, int]:
            return None, work.named(self.shelf(request), str(text or "")), count + 1

        # Preprocessing would copy every file; `Shelf.take` checks where it is.
        _on(drop.upload, dropped, [drop, self.listed], [drop, problem, self.listed], preprocess=False)
        _on(add.click, searched, [name, self.listed], [name, problem, self.listed])

        def cards(count: int, request: gr.Request) -> None:
            for number, entry in enumerate(self.shelf(request).entries):
                self._card(number, entry)

        gr.render(inputs=[self.listed], show_progress="hidden")(cards)

    def _card(self, number: int, entry: Entry) -> None:
        """Lay out what a LoRA is, and its weights."""

        def weigh(block: str) -> Callable[[float, int], int]:
            def set_weight(value: float, count: int) -> int:
                if block:
                    entry.of_blocks[block] = float(value)
                else:
                    entry.weight = float(value)
                return count + 1

            return set_weight

        def choose(blocks: Any, count: int) -> int:
            entry.of_blocks = {b: entry.of_blocks.get(b, entry.weight) for b in entry.blocks if b in (blocks or [])}
            return count + 1

        def remove(count: int, request: gr.Request) -> int:
            self.shelf(request).remove(entry.name)
            return count + 1

        with gr.Group():
            gr.HTML(entry.card, padding=False, elem_classes="card")
            sliders = {
                "": gr.Slider(
                    -2, 2, entry.weight, step=0.05, interactive=True, label="Weight", elem_id=f"weight-{number}"
                )
            }
            for block, weight in entry.of_blocks.items():
                sliders[block] = gr.Slider(
                    -2, 2, weight, step=0.05, interactive=True, label=f"Weight of {block}", elem_classes="block"
                )
            with gr.Accordion("Weights by block", open=bool(entry.of_blocks)):
                chosen = gr.Dropdown(
                    list(entry.blocks),
                    value=list(entry.of_blocks),
                    multiselect=True,
                    interactive=True,
                    label="Blocks that get a weight of their own",
                    elem_id=f"blocks-{number}",
                )
            out = gr.Button("Remove", size="sm", elem_id=f"remove-{number}")
        for block, slider in sliders.items():
            _on(slider.change, weigh(block), [slider, self.touched], [self.touched], trigger_mode="always_last")
        _on(chosen.input, choose, [chosen, self.listed], [self.listed])
        _on(out.click, remove, [self.listed], [self.listed])

    def _controls(self) -> list[Any]:
        """Lay out the choices that all LoRAs share, in the order of `FIELDS`."""
        gr.HTML("<h2>2. How to merge</h2>")
        rules = [("as set for each LoRA", ""), *((f"{rule.name}: {rule.text}", rule.name) for rule in RULES.values())]
        with gr.Row():
            method = gr.Dropdown(
                list(METHODS), value="linear", label="Method", info=METHODS["linear"].title, elem_id="method"
            )
            rule = gr.Dropdown(rules, value="", label="Weights", info="Those of the LoRAs, or a rule.", elem_id="rule")
        options = gr.Textbox(label="Options of the method", visible=False, elem_id="options")
        fit = gr.Radio(list(FITS), value=EXACT, label="Rank of the result", elem_id="fit")
        limit = gr.Textbox(label="Limit", visible=False, elem_id="limit")
        with gr.Row():
            dialects = [(f"{d.name}: {d.title}", d.name) for d in DIALECTS.values() if d.writes and d.name != "peft"]
            to = gr.Dropdown(
                [("that of the first LoRA", ""), *dialects], value="", label="For which tool", elem_id="to"
            )
            dtypes = [("that of the LoRAs", ""), "float16", "bfloat16", "float32"]
            dtype = gr.Dropdown(dtypes, value="", label="Precision", elem_id="dtype")
        with gr.Accordion("More", open=False):
            exclude = gr.Textbox(label="Modules to leave out", placeholder="text_encoder* *attn1*", elem_id="exclude")
            base = gr.Textbox(
                label="Base model, for DoRA layers: a path in the given folders",
                visible=bool(self.folders),
                elem_id="base",
            )
            allow = gr.CheckboxGroup(list(ALLOW), label="Allow", elem_id="allow")

        def about_method(name: str) -> tuple[Any, Any]:
            title = METHODS[name].title if name in METHODS else ""
            own = METHODS[name].options.values() if name in METHODS else ()
            told = "; ".join(f"{option.name}: {option.wanted}" for option in own)
            example = " ".join(f"{option.name}={option.default}" for option in own)
            return gr.update(info=title), gr.update(visible=bool(told), value="", placeholder=example, info=told)

        def about_limit(name: str) -> Any:
            example, told = LIMITS.get(name, ("", ""))
            return gr.update(visible=bool(told), value="", placeholder=example, info=told)

        _on(method.input, about_method, [method], [method, options])
        _on(fit.input, about_limit, [fit], [limit])
        return [rule, method, options, fit, limit, to, dtype, exclude, base, allow]

    def _results(self, controls: list[Any]) -> None:
        """Lay out the buttons, the plan, the file, and what makes the same file elsewhere."""
        gr.HTML("<h2>3. Merge</h2>")
        with gr.Row():
            look = gr.Button("Show the plan", min_width=90, elem_id="look")
            compare = gr.Button("Compare", min_width=90, elem_id="compare")
            merge = gr.Button("Merge", variant="primary", min_width=90, elem_id="merge")
        file = gr.DownloadButton("Download", variant="primary", visible=False, elem_id="download")
        plan = gr.HTML(elem_id="plan", elem_classes="shown", padding=False)
        comparison = gr.HTML(elem_id="comparison", elem_classes="shown", padding=False)
        command = gr.Textbox(
            label="The command that makes this file", lines=2, buttons=["copy"], elem_classes="typed", elem_id="command"
        )
        python = gr.Textbox(
            label="The Python that makes this file", lines=2, buttons=["copy"], elem_classes="typed", elem_id="python"
        )
        results = [plan, file, command, python]

        def shown(found: work.Shown) -> list[Any]:
            ready = gr.update(visible=found.file is not None, value=found.file and str(found.file))
            return [found.plan, ready, found.command, found.python]

        def choice(values: Sequence[Any], request: gr.Request) -> work.Choice:
            given = {
                name: value or () if name == "allow" else str(value or "")
                for name, value in zip(FIELDS, values, strict=True)
            }
            return work.Choice(self.shelf(request), given)

        def look_at(request: gr.Request, *values: Any) -> list[Any]:
            return shown(work.looked_at(choice(values, request)))

        def show_plan(request: gr.Request, *values: Any, progress: gr.Progress = PROGRESS) -> list[Any]:
            return shown(work.planned(choice(values, request), _moving(progress, "Measuring")))

        def run(request: gr.Request, *values: Any, progress: gr.Progress = PROGRESS) -> list[Any]:
            return shown(work.merged(choice(values, request), _moving(progress, "Merging")))

        def show_shared(base: str, request: gr.Request, progress: gr.Progress = PROGRESS) -> str:
            return work.compared(self.shelf(request), str(base or ""), _moving(progress, "Comparing"))

        _on(look.click, show_plan, controls, results, progress=plan)
        _on(merge.click, run, controls, results, progress=plan)
        _on(compare.click, show_shared, [controls[FIELDS.index("base")]], [comparison], progress=comparison)
        changes = [control.change for control in controls] + [self.listed.change, self.touched.change]
        gr.on(
            changes,
            look_at,
            controls,
            results,
            show_progress="hidden",
            api_visibility="private",
            trigger_mode="always_last",
        )
        _on(self.listed.change, lambda: "", [], [comparison])


def _on(event: Any, function: Callable[..., Any], inputs: Any, outputs: Any, progress: Any = None, **more: Any) -> None:
    """Call a function on an event; none of them is offered as an API."""
    shown = "hidden" if progress is None else "full"
    event(function, inputs, outputs, api_visibility="private", show_progress=shown, show_progress_on=progress, **more)


def _moving(bar: gr.Progress, label: str) -> Callable[[int, int], None]:
    """Return a function that moves gradio's bar."""
    return lambda done, total: bar((done, total), desc=label, unit="modules")
