"""``loramerge dialects``: the dialects that are read and written."""

from .options import Json
from .output import print_json, say, table


def run(json: Json = False) -> None:
    """List the dialects that are read and written.

    Example: loramerge dialects
    """
    from ..files.dialects import DIALECTS

    if json:
        print_json(
            [{"name": d.name, "writes": d.writes, "title": d.title, "source": d.source} for d in DIALECTS.values()]
        )
        return
    rows = [[d.name, "read, write" if d.writes else "read", d.title] for d in DIALECTS.values()]
    say(table(["dialect", "", "tools"], rows))
