"""Sessions on the pages of the documentation: they fit, and their copy button takes what is typed."""

import html
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HOOKS = runpy.run_path(str(ROOT / "docs" / "_hooks.py"))
SESSION = re.compile(r"^```(\w*)\n(\$ .*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_fit_on_a_page_and_what_they_print_is_not_taken_for_shell(page: Path) -> None:
    sessions = SESSION.findall(page.read_text(encoding="utf-8"))

    assert {language for language, _ in sessions} <= {"console", "text"}
    typed = [line for _, text in sessions for line in HOOKS["commands_of"](text)]
    assert [line for line in typed if len(line) > 76 and '"' not in line] == []


def test_the_copy_button_of_a_session_takes_the_commands_alone() -> None:
    printed = '<span class="go">file  &amp; dialect</span>\n'
    session = (
        '<div class="highlight"><pre><span></span><code><span class="gp">$ </span>loramerge<span class="w"> </span>merge a.b '
        f'<span class="se">\\</span>\n    -w <span class="s1">&#39;1;MID=0.5&#39;</span>\n{printed}$ ls\n</code></pre></div>'
    )
    code = '<div class="highlight"><pre><span></span><code>both = lm.merge(a, b)\n</code></pre></div>'

    page = HOOKS["on_page_content"](f"<p>$ </p>{session}{code}")

    copied = re.findall(r'<div data-copy="([^"]*)" class="highlight">', page)
    assert [html.unescape(text) for text in copied] == ["loramerge merge a.b \\\n    -w '1;MID=0.5'\nls"]
    assert page.endswith(code)
