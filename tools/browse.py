"""Every page of the documentation, or of a study's report, opened in Chromium as a reader would: on a desk and on a phone.

    mkdocs build --strict && python tools/browse.py site
    python tools/browse.py build/study/mini

A page fails if it logs an error, asks another host for anything, shows an image that is not there or has no words
in its place, is wider than the screen, or links to a page or a heading that does not exist.  The search, where there
is one, must find something for a few words.  ``--pictures FOLDER`` keeps a picture of every page, to be looked at.
"""

import argparse
import base64
import json
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag

from chromium import Tab

WIDTHS = (1280, 390)
WORDS = ("ziplora", "comfyui", "alpha", "hugging face", "block weights")
FACTS = """({
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a[href]")].map(e => e.href),
    images: [...document.images].filter(i => !i.naturalWidth || !i.alt.trim()).map(i => i.src),
    wide: [document.body, ...document.querySelectorAll("article *")].filter(e =>
        Math.max(e.getBoundingClientRect().right, e === document.body ? document.documentElement.scrollWidth : 0)
        > document.documentElement.clientWidth + 1 && !e.closest("pre, .md-typeset__scrollwrap")).map(e => e.outerHTML.slice(0, 80)),
    height: document.documentElement.scrollHeight,
})"""
SEARCH = """(async () => {
    const field = document.querySelector("[data-md-component=search-query]");
    field.focus();
    field.value = %s;
    field.dispatchEvent(new Event("keyup", {bubbles: true}));
    for (let i = 0; i < 50; i++) {
        await new Promise(done => setTimeout(done, 100));
        const found = [...document.querySelectorAll(".md-search-result__article h1")].map(e => e.textContent);
        if (found.length) return found;
    }
    return [];
})()"""


def complaints(events: list[dict[str, Any]], home: str) -> list[str]:
    found = []
    for event in events:
        match event["method"], event["params"]:
            case "Runtime.exceptionThrown", what:
                found.append(f"exception: {what['exceptionDetails']['text']}")
            case "Log.entryAdded", {"entry": {"level": "error", "text": text} as entry}:
                if entry.get("url") != f"{home}favicon.ico":  # which a browser asks for unasked
                    found.append(f"error: {text} {entry.get('url', '')}")
            case "Runtime.consoleAPICalled", {"type": "error" | "warning", "args": said}:
                found.append(f"console: {[part.get('value') for part in said]}")
            case "Network.requestWillBeSent", {"request": {"url": url}} if not url.startswith((home, "data:", "blob:")):
                found.append(f"asks another host: {url}")
    return found


def inspect(tab: Tab, site: Path, home: str, pictures: Path | None) -> tuple[list[str], dict[str, Any]]:
    """Open every page at every width: what is wrong, and what is on each page."""
    wrong, pages = [], {}
    for file in sorted(site.rglob("*.html")):
        page = file.relative_to(site).as_posix().removesuffix("index.html")
        for width in WIDTHS:
            tab.visit(home + page, width)
            facts = pages[home + page] = tab.run(FACTS)
            found = complaints(tab.events, home)
            found += [f"image without file or words: {src}" for src in facts["images"]]
            found += [f"wider than the screen: {what}" for what in facts["wide"][:3]]
            wrong += [f"{page or '/'} at {width}: {what}" for what in found]
            if pictures:
                tab.resize(width, min(facts["height"], 16000))
                shot = base64.b64decode(tab.call("Page.captureScreenshot")["data"])
                (pictures / f"{page.strip('/').replace('/', '-') or 'index'}-{width}.png").write_bytes(shot)
    return wrong, pages


def broken_links(pages: dict[str, Any], site: Path, home: str) -> list[str]:
    wrong = []
    for page, facts in pages.items():
        for link in sorted({link for link in facts["links"] if link.startswith(home)}):
            target, anchor = urldefrag(link)
            there = target in pages or (site / target.removeprefix(home)).is_file()
            if not there or (anchor and target in pages and anchor not in pages[target]["ids"]):
                wrong.append(f"{page.removeprefix(home) or '/'} links to {link.removeprefix(home)}, which is not there")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="a folder of pages")
    parser.add_argument("--pictures", type=Path)
    given = parser.parse_args()
    if given.pictures:
        given.pictures.mkdir(parents=True, exist_ok=True)

    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=given.site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        tab = Tab(profile)
        wrong, pages = inspect(tab, given.site, home, given.pictures)
        wrong += broken_links(pages, given.site, home)
        for word in WORDS if (given.site / "search").is_dir() else ():
            tab.visit(home, WIDTHS[0])
            found = tab.run(SEARCH % json.dumps(word))
            print(f"search for {word}: {', '.join(found[:4]) or 'nothing'}")
            wrong += [] if found else [f"the search finds nothing for {word}"]
        tab.call("Browser.close")
        tab.chromium.wait()
    print(*wrong, f"{len(pages)} pages at {' and '.join(map(str, WIDTHS))} pixels: {len(wrong)} faults", sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
