"""The look of the page, and what browsers are told that it may load."""

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { width: 100% !important; max-width: min(1180px, 100%) !important; margin: 0 auto !important;
  box-sizing: border-box; }
.columns > * { min-width: 0 !important; }
@media (max-width: 700px) { .columns { flex-direction: column; } .columns > * { width: 100%; } }
.gradio-container h1 { font-size: 1.6rem; margin: 0; }
.gradio-container h2 { font-size: 1.1rem; margin: .6rem 0 0; }
.card, .card > div { padding: 0 !important; margin: 0 !important; }
.card .lora { padding: .8rem .9rem .3rem !important; overflow-wrap: anywhere; background: var(--block-background-fill); }
.lora h3 { margin: 0 0 .3rem; font-size: 1rem; }
details > summary { cursor: pointer; margin: .4rem 0; }
table.facts, table.bars { border-collapse: collapse; width: 100%; margin: 0; font-size: .85rem; }
table.facts, table.facts *, table.bars, table.bars * { border: 0 !important; }
table.facts :is(th, td), table.bars :is(th, td) {
  padding: .12rem .6rem .12rem 0 !important; text-align: left; vertical-align: top; }
table.facts th { width: 7.5rem; font-weight: 600; }
table.bars caption { text-align: left; font-size: .8rem; opacity: .75; padding: .3rem 0; }
table.bars th { font-weight: 400; white-space: nowrap; }
table.bars .bar { width: 55%; vertical-align: middle; }
table.bars .bar span { display: block; height: .7rem; min-width: 1px; background: #4a6da7; border-radius: 2px; }
.shown pre { overflow-x: auto; font-size: .76rem; line-height: 1.35; margin: 0; padding: .6rem; white-space: pre;
  background: rgba(127, 127, 127, .1); border-radius: 6px; }
@media (min-width: 700px) { .shown > div > pre, .shown .prose > pre { white-space: pre-wrap; } }
.shown img { width: 100%; height: auto; background: white; border-radius: 6px; margin: .4rem 0; }
p.problem { color: #8f1d14; background: #fdecea; border-left: 4px solid #c4372b; padding: .5rem .7rem; margin: .3rem 0;
  border-radius: 4px; overflow-wrap: anywhere; }
p.note { padding: .4rem .7rem; margin: .3rem 0; border-left: 4px solid #4a6da7; }
.typed textarea { font-family: ui-monospace, Menlo, Consolas, monospace !important; font-size: .78rem !important;
  white-space: pre; overflow-x: auto; }
.name { align-items: end; }
"""

HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""The names under which a page on this machine alone is asked for; others come from pages elsewhere (DNS rebinding)."""

POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""The content security policy: a browser asks no other host for anything."""
