"""``loramerge compositions``: how several LoRAs can be at work at once, without a merge."""

from .options import Json
from .output import print_json, say, table


def run(json: Json = False) -> None:
    """List the ways in which several LoRAs work at once without a merge: this one only there, or only then.

    Example: loramerge compositions
    """
    from ..diffusion.composing import COMPOSITIONS

    if json:
        print_json(
            [
                {"name": c.name, "title": c.title, "source": c.source, "passes": c.passes, "options": list(c.options)}
                for c in COMPOSITIONS.values()
            ]
        )
        return
    rows = []
    for each in COMPOSITIONS.values():
        rows.append([each.name, each.passes, each.title])
        rows += [["", "", option.usage] for option in each.options.values()]
    say(table(["composition", "passes", "what it does, and its options"], rows))
    say("Passes: of the denoiser per step, for N LoRAs. loramerge generate --compose NAME draws with one.")
