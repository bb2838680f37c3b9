"""The commands of the command line; each is ``run`` in the module of its name, imported when it is called."""

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .._version import __version__
from .output import say

VERBS = {
    "inspect": "Say what a LoRA is: its dialect, family, ranks, alphas, kinds, blocks.",
    "metadata": "Show the strings in a file's header, or change them: trigger words, a title, a picture. The tensors stay.",
    "convert": "Write a LoRA under another tool's names; what it does to the model stays the same.",
    "merge": "Merge LoRAs into one: the exact weighted sum, or its best fit at a smaller rank; or as a recipe says.",
    "average": "Average the checkpoints of one training run: their mean, or a moving average (EMA) made after training.",
    "train": "Train a LoRA on pictures with captions, through diffusers and PEFT.",
    "zip": "Merge LoRAs by coefficients learned on the base model (ZipLoRA): an ordinary LoRA comes out.",
    "calibrate": "Merge LoRAs by least squares on what the base model's modules see: no gradients, an ordinary LoRA comes out.",
    "coefficients": "Show learned coefficients: for every block and LoRA how they spread.",
    "resize": "Make a LoRA smaller: the best fit at a rank, or ranks that spend one budget over all modules.",
    "sweep": "Merge a recipe with every combination of settings, and compare what comes out.",
    "bake": "Add LoRAs to the weights of a base model, and say what rounding took away.",
    "extract": "Make a LoRA of the difference between a fine-tuned model and its base: the best fit at a rank.",
    "push": "Upload a LoRA to the Hugging Face Hub, with a model card of what its file records.",
    "generate": "Draw pictures with LoRAs: every setting, prompt and seed, each with its recipe inside, and a contact sheet.",
    "score": "Score pictures: the cosine of their DINOv2 embeddings with those of each reference set.",
    "diff": "Say whether two files are the same LoRA: the difference of ΔW, module by module. Exit code 1 if not.",
    "check": "Say whether files load in a program: all of it, in part or not, and why. Exit code 0 if all do, 1 if not, 3 if unknown.",
    "compare": "Say what LoRAs share and where they fight, before they are merged.",
    "compositions": "List the ways in which several LoRAs work at once without a merge: this one only there, or only then.",
    "ui": "Open a page in the browser: drop LoRAs, see and compare them, merge them, download the result.",
    "dialects": "List the dialects that are read and written.",
    "methods": "List the merge methods and their options: loramerge's own, and those that installed packages publish.",
    "doctor": "Check this installation: versions, devices, optional extras, and a merge that is checked against dense algebra.",
}
"""The name of every command, in the order of ``--help``, and the first sentence of its own help."""

INTRODUCTION = """\
loramerge: any LoRA in, an exact merge, any tool's LoRA out.

  loramerge inspect a.safetensors                                   what is in a file
  loramerge convert a.safetensors -o b.safetensors --to comfyui     another tool's names
  loramerge compare a.safetensors b.safetensors                     what two share, before they are merged
  loramerge merge a.safetensors b.safetensors -o both.safetensors   the weighted sum, or -m ties, dare, …
  loramerge --help                                                  every command, and -h after each of them
  loramerge doctor                                                  is everything installed and right?"""

SHOWN: dict[str, Any] = {"rich_markup_mode": None, "context_settings": {"help_option_names": ["-h", "--help"]}}
"""The look of ``--help``, for the app and every command."""


def real(verb: str) -> Any:
    """Import a command's module and return the command with its options."""
    alone = typer.Typer(add_completion=False, **SHOWN)
    alone.command(verb)(import_module(f".{verb}", __package__).run)
    return typer.main.get_command(alone)


class Later(TyperCommand):
    """A command that is known by name and summary, and imported when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the real command, which click then invokes."""
        return real(self.name or "").make_context(info_name, args, parent=parent, **extra)


app = typer.Typer(invoke_without_command=True, add_completion=True, pretty_exceptions_enable=False, **SHOWN)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"loramerge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Merge LoRAs of diffusion models: any dialect in, an exact merge, any dialect out."""
    if context.invoked_subcommand is None:
        say(*INTRODUCTION.split("\n"))


def _stub() -> None:
    """Stand in for a command that is not imported yet."""


for _verb, _summary in VERBS.items():
    app.command(_verb, help=_summary, cls=Later)(_stub)
