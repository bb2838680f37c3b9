"""Open every page of the documentation, or of a study's report, in Chromium: as wide as a desktop's screen and a phone's.

    pip install playwright && apt install chromium    # or: playwright install chromium
    mkdocs build --strict && python tools/browse.py site
    python tools/browse.py build/study/mini

A page fails if it logs an error, asks another host for anything, shows an image that is missing or has no
alternative text, is wider than the screen, or links to a page or a heading that does not exist.  The search, where
there is one, must find something for a few words.  ``--pictures FOLDER`` keeps a screenshot of every page.
"""

import argparse
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag

from playwright.sync_api import Browser, ConsoleMessage, Page, TimeoutError, sync_playwright

WIDTHS = (1280, 390)
WORDS = ("ziplora", "comfyui", "alpha", "hugging face", "block weights")
FACTS = """() => ({
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a[href]")].map(e => e.href),
    images: [...document.images].filter(i => !i.naturalWidth || !i.alt.trim()).map(i => i.src),
    wide: [document.body, ...document.querySelectorAll("article *")].filter(e =>
        Math.max(e.getBoundingClientRect().right, e === document.body ? document.documentElement.scrollWidth : 0)
        > document.documentElement.clientWidth + 1 && !e.closest("pre, .md-typeset__scrollwrap")).map(e => e.outerHTML.slice(0, 80)),
    height: document.documentElement.scrollHeight,
})"""


def listen(page: Page, home: str) -> list[str]:
    """Return a list that every fault which the page reports from now on is added to."""
    found: list[str] = []

    def logged(message: ConsoleMessage) -> None:
        url = message.location["url"]
        if message.type in ("error", "warning") and url != f"{home}favicon.ico":  # browsers ask for it unasked
            found.append(f"{message.type}: {message.text} {url}")

    def asked(url: str) -> None:
        if not url.startswith((home, "data:", "blob:")):
            found.append(f"asks another host: {url}")

    page.on("console", logged)
    page.on("pageerror", lambda error: found.append(f"exception: {error}"))
    page.on("request", lambda request: asked(request.url))
    return found


def visit(page: Page, url: str) -> None:
    """Open a page, and wait until all of it is there and asks for nothing more."""
    page.goto(url)
    page.wait_for_load_state("networkidle")  # by itself it may come before a long page is parsed


def inspect(browser: Browser, site: Path, home: str, pictures: Path | None) -> tuple[list[str], dict[str, Any]]:
    """Open every page at every width; return what is wrong, and the headings and links of each page."""
    wrong, facts = [], {}
    for width in WIDTHS:
        page = browser.new_page(viewport={"width": width, "height": 844}, is_mobile=width < 600)
        found = listen(page, home)
        for file in sorted(site.rglob("*.html")):
            name = file.relative_to(site).as_posix().removesuffix("index.html")
            visit(page, home + name)
            facts[home + name] = seen = page.evaluate(FACTS)
            found += [f"image without file or words: {src}" for src in seen["images"]]
            found += [f"wider than the screen: {what}" for what in seen["wide"][:3]]
            wrong += [f"{name or '/'} at {width}: {what}" for what in found]
            found.clear()
            if pictures:
                target = pictures / f"{name.strip('/').replace('/', '-') or 'index'}-{width}.png"
                clip = {"x": 0, "y": 0, "width": width, "height": min(seen["height"], 16000)}
                page.screenshot(path=target, full_page=True, clip=clip)
        page.close()
    return wrong, facts


def broken_links(pages: dict[str, Any], site: Path, home: str) -> list[str]:
    wrong = []
    for page, facts in sorted(pages.items()):
        for link in sorted({link for link in facts["links"] if link.startswith(home)}):
            target, anchor = urldefrag(link)
            there = target in pages or (site / target.removeprefix(home)).is_file()
            if not there or (anchor and target in pages and anchor not in pages[target]["ids"]):
                wrong.append(f"{page.removeprefix(home) or '/'} links to {link.removeprefix(home)}, which is not there")
    return wrong


def search(browser: Browser, home: str) -> list[str]:
    """Type each of a few words into the site's search; return those that it finds nothing for."""
    page, wrong = browser.new_page(viewport={"width": WIDTHS[0], "height": 844}), []
    titles = page.locator(".md-search-result__article h1")
    for word in WORDS:
        visit(page, home)
        page.locator("[data-md-component=search-query]").press_sequentially(word)
        try:
            titles.first.wait_for(state="attached", timeout=5000)
        except TimeoutError:
            wrong.append(f"the search finds nothing for {word}")
        print(f"search for {word}: {', '.join(titles.all_text_contents()[:4]) or 'nothing'}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="a folder of pages")
    parser.add_argument("--pictures", type=Path)
    given = parser.parse_args()

    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=given.site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))  # or playwright's own
        wrong, pages = inspect(browser, given.site, home, given.pictures)
        wrong += broken_links(pages, given.site, home)
        wrong += search(browser, home) if (given.site / "search").is_dir() else []
    print(*wrong, f"{len(pages)} pages at {' and '.join(map(str, WIDTHS))} pixels: {len(wrong)} faults", sep="\n")
    sys.exit(bool(wrong) or not pages)


if __name__ == "__main__":
    main()
