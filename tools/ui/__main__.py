"""Use the page of ``loramerge ui`` in Chromium as a visitor does, as wide as a desktop's screen and a phone's.

    pip install '.[ui]' playwright && apt install chromium
    python tools/ui --pictures build/ui

Two files are dropped, merged and downloaded by clicking, and the bytes compared with those of the command and of the
Python that the page shows.  Then hostile files are dropped, each of which must end in a readable message.  The run
fails if the page asks another host for anything, logs an error, is wider than the screen, or leaves a file behind.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright

import loramerge as lm
from hostile import uploads
from loramerge.testing import random_lora

WIDTHS = (1280, 390)
SLOW = 240_000
"""Milliseconds to wait for anything: the machine may be busy."""
PLACES = (
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn",
    "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn",
    "text_encoder.text_model.encoder.layers.0.self_attn.",
)
MESSAGES = "[...document.querySelectorAll('#problem .problem')].map(p => p.innerText.trim())"
"""A script that returns the messages on refused files."""
TOGETHER = 17
"""The number of hostile files that are dropped at once."""
FILES = ("person.safetensors", "jersey.safetensors")


class Visitor:
    """Someone at the page, who counts clicks; hosts that the page asks and errors that it logs are kept."""

    def __init__(self, browser: Browser, address: str, width: int) -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, accept_downloads=True)
        self.page.set_default_timeout(SLOW)
        self.clicks, self.hosts, self.errors = 0, set[str](), list[str]()
        self.page.on(
            "request", lambda request: self.hosts.add(request.url.split("/")[2] if "//" in request.url else "")
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.goto(address)
        self.page.wait_for_selector("#merge")

    def click(self, selector: str) -> None:
        self.page.click(selector)
        self.clicks += 1

    def drop(self, *files: Path) -> None:
        """Give files to the file chooser, which counts as a click."""
        self.page.set_input_files("#drop input[type=file]", [str(file) for file in files])
        self.clicks += 1

    def command(self) -> str:
        return self.page.input_value("#command textarea")

    def picture(self, folder: Path | None, name: str) -> None:
        time.sleep(1)  # gradio fades things in
        if folder:
            self.page.screenshot(path=folder / f"{name}.png", full_page=True)

    def too_wide(self) -> bool:
        return bool(
            self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth + 1")
        )


def merge_by_clicking(visitor: Visitor, folder: Path, pictures: Path | None, label: str) -> list[str]:
    """Merge two files by clicking, and return what is wrong."""
    page, wrong = visitor.page, []
    visitor.drop(*(folder / name for name in FILES))
    page.wait_for_selector("#weight-1")
    page.wait_for_function("document.querySelector('#command textarea').value.includes('-w 1')")
    visitor.picture(pictures, f"{label}-dropped")
    page.fill("#weight-0 input[type=number]", "0.7")
    page.press("#weight-0 input[type=number]", "Tab")
    page.wait_for_function("document.querySelector('#command textarea').value.includes('-w 0.7')")
    visitor.click("#fit label:has(input[value='rank'])")
    page.fill("#limit textarea, #limit input", "6")
    page.press("#limit textarea, #limit input", "Tab")
    page.wait_for_function("document.querySelector('#command textarea').value.includes('--rank 6')")
    visitor.click("#merge")
    page.wait_for_selector("#download:visible")
    visitor.picture(pictures, f"{label}-merged")
    with page.expect_download() as download:
        visitor.click("#download")
    download.value.save_as(folder / "downloaded.safetensors")
    clicks = visitor.clicks
    wanted = (folder / "downloaded.safetensors").read_bytes()
    shown = {
        "command": ["-m", *shlex.split(visitor.command().replace("\\\n", ""))],
        "Python": ["-c", page.input_value("#python textarea")],
    }
    for name, words in shown.items():
        subprocess.run([sys.executable, *words], cwd=folder, check=True, capture_output=True)
        if (folder / "merged.safetensors").read_bytes() != wanted:
            wrong.append(f"the {name} makes other bytes than were downloaded")
        (folder / "merged.safetensors").unlink()
    print(f"{label}: {clicks} clicks, {len(wanted)} bytes; {' '.join(visitor.command().split())}")
    visitor.click("#compare")
    page.wait_for_selector("#comparison img")
    visitor.picture(pictures, f"{label}-compared")
    return wrong + [f"{clicks} clicks"] * (clicks >= 10)


def drop_hostile(visitor: Visitor, folder: Path, pictures: Path | None) -> list[str]:
    """Drop hostile files, some at a time, and return what is wrong: each must end in a message of its own."""
    page, wrong, count = visitor.page, list[str](), 0
    files = list(uploads(folder))
    for begin in range(0, len(files), TOGETHER):
        batch = files[begin : begin + TOGETHER]
        before = page.evaluate(MESSAGES)
        kind = "application/octet-stream"
        payloads = [{"name": name, "mimeType": kind, "buffer": data} for name, data in batch]
        page.set_input_files("#drop input[type=file]", payloads)
        try:
            page.wait_for_function(
                f"{MESSAGES}.length && {MESSAGES}.join() != {json.dumps(','.join(before))}", timeout=SLOW
            )
        except TimeoutError:
            wrong.append(f"no message for {[name for name, _ in batch]}")
            continue
        told = page.evaluate(MESSAGES)
        if len(told) != len(batch):
            wrong.append(f"{len(told)} messages for {len(batch)} files")
        for (name, _), message in zip(batch, told, strict=False):
            bad = "Traceback" in message or "foresee" in message
            wrong += [f"{name!r}: {message!r}"] * bad
            count += not bad
            print(f"  {name[:50]!r}: {message[:110]!r}")
    visitor.picture(pictures, "hostile")
    print(f"{count} of {len(files)} hostile files ended in a message")
    if page.query_selector("#weight-0"):
        wrong.append("a hostile file is on the page")
    return wrong


def left_behind(root: Path) -> list[str]:
    return [str(path) for path in root.rglob("*") if path.is_file()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="the folder for screenshots")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser")
    given = parser.parse_args()
    wrong: list[str] = []
    if given.pictures:
        given.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder, root = Path(place) / "files", Path(place) / "temporary"
        folder.mkdir()
        root.mkdir()
        for name, rank, seed, dialect in ((FILES[0], 4, 1, "kohya"), (FILES[1], 8, 2, "diffusers-peft")):
            lora = random_lora(
                "sdxl",
                rank=rank,
                seed=seed,
                dtype="float16",
                only=lambda module, _: module.startswith(PLACES),
            )
            lm.save(lora, folder / name, dialect=dialect)
        lm.edit_metadata(folder / FILES[0], {"modelspec.trigger_phrase": "woody person"})
        server = subprocess.Popen(
            [sys.executable, "-u", "-m", "loramerge", "ui", "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(root)},
        )
        try:
            assert server.stdout
            line = server.stdout.readline()
            address = next(word for word in line.split() if word.startswith("http"))
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
                for width in WIDTHS:
                    visitor = Visitor(browser, address, width)
                    visitor.picture(given.pictures, f"{width}-empty")
                    wrong += merge_by_clicking(visitor, folder, given.pictures, str(width))
                    wrong += [f"{width}: too wide"] * visitor.too_wide()
                    wrong += seen(visitor)
                    visitor.page.close()
                visitor = Visitor(browser, address, WIDTHS[0])
                time.sleep(5)  # the server hears that pages were closed
                before = left_behind(root)
                wrong += drop_hostile(visitor, folder, given.pictures)
                after = left_behind(root)
                print(f"files stored before and after the hostile ones: {len(before)}, {len(after)}")
                wrong += [f"left behind: {path}" for path in after if path not in before]
                wrong += seen(visitor)
                browser.close()
        finally:
            server.terminate()
            server.wait(60)
        left = left_behind(root)
        print(f"files left when the page has ended: {len(left)}")
        wrong += [f"left at the end: {path}" for path in left]
    print("\n".join(wrong) or "All is well.")
    return bool(wrong)


def seen(visitor: Visitor) -> list[str]:
    """Return what the page asked of other hosts, and the errors that it logged."""
    here = visitor.page.url.split("/")[2]
    others = sorted(visitor.hosts - {here, ""})
    print(f"  hosts asked: {sorted(visitor.hosts - {''})}; errors logged: {len(visitor.errors)}")
    return [f"asks {host}" for host in others] + [f"logs {error}" for error in visitor.errors]


if __name__ == "__main__":
    sys.exit(main())
