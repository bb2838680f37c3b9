"""The notebook runs from top to bottom."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = """
import json, sys
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
space = {}
for cell in cells:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), space)
space["sheet"](space["shots_of"]({n: space["out"] / "pictures" / n for n in space["settings"]})).save("last.png")
"""


def test_the_notebook_runs_and_ends_in_a_sheet_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "virtual_tryon").symlink_to(EXAMPLES / "virtual_tryon")
    environment = os.environ | {"MPLBACKEND": "agg", "HF_MODULES_CACHE": str(tmp_path / "modules")}

    done = subprocess.run(
        [sys.executable, "-c", RUN, EXAMPLES / "merge.ipynb"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "notebook_output").glob("both-*.safetensors"))) == 3
    with Image.open(tmp_path / "last.png") as image:
        assert min(image.size) > 300


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "merge.ipynb").read_text(encoding="utf-8"))["cells"]

    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code"
    )
