"""The look of the report: one style sheet, and the few pieces that sections are made of."""

from __future__ import annotations

from html import escape

from unimed.notice import NOTICE

STYLE = """
:root{--ink:#1c2733;--muted:#66758a;--line:#e3e8ee;--back:#f6f8fa;--card:#fff;--accent:#0b6e99;--true:#00d1a0;--guess:#ff8a1f;--bad:#b3261e;--good:#0a7d56}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 24px 64px}
header h1{font-size:30px;margin:0 0 4px;letter-spacing:-.01em}
header p{margin:0;color:var(--muted)}
.notice{display:inline-block;margin:14px 0 0;padding:4px 12px;border-radius:999px;background:#fdecea;color:var(--bad)}
.notice{font-weight:600;font-size:13px}
nav{margin:18px 0 0;font-size:14px}nav a{color:var(--accent);text-decoration:none;margin-right:16px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 26px;margin-top:22px}
h2{font-size:19px;margin:0 0 6px}h3{font-size:15px;margin:18px 0 6px}
.lead{color:var(--muted);margin:0 0 14px;max-width:78ch}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:22px}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.card b{display:block;font-size:24px;letter-spacing:-.01em}.card span{color:var(--muted);font-size:13px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th b{color:var(--ink);font-size:15px}th{font-weight:500;color:var(--muted);text-align:left;font-size:13px}
th,td{padding:5px 10px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr.last td,tr.last th{border-bottom:2px solid var(--line)}
.bar{position:relative;height:16px;background:#eef2f6;border-radius:4px;overflow:hidden;min-width:90px}
.bar i{position:absolute;inset:0 auto 0 0;background:#b9c5d1;border-radius:4px}.bar.trained i{background:var(--accent)}
.value{text-align:right;width:5.5em}.strict{color:var(--muted)}small{font-size:11.5px}
.yes{color:var(--good);font-weight:600}.no{color:var(--bad);font-weight:600}
.scroll{overflow-x:auto}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(168px,1fr));gap:14px}
figure{margin:0}figure svg{width:100%;aspect-ratio:1;border-radius:8px;background:#000;display:block}
figcaption{font-size:12.5px;color:var(--muted);margin-top:4px;line-height:1.35}figcaption b{color:var(--ink)}
.plot svg{width:100%;height:auto;display:block}.narrow{max-width:560px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:14px}
.example{display:flex;gap:14px;padding:12px;border:1px solid var(--line);border-radius:10px;border-left-width:4px}
.example.right{border-left-color:var(--good)}.example.wrong{border-left-color:var(--bad)}
.example figure{flex:0 0 116px}.example div{min-width:0;overflow-wrap:anywhere;font-size:13.5px}
.example p{margin:0 0 5px}.tag{font-size:12px;font-weight:600}
.key i{display:inline-block;width:12px;height:12px;border-radius:3px;margin:0 5px -1px 12px}
pre{background:var(--back);border:1px solid var(--line);border-radius:8px;padding:12px;overflow:auto;max-height:420px}
pre{font-size:12.5px;line-height:1.4}
footer{color:var(--muted);font-size:13px;margin-top:22px}
@media print{body{background:#fff}section{break-inside:avoid}}
"""


def page(title: str, subtitle: str, cards: str, sections: list[tuple[str, str, str]]) -> str:
    """A whole document. Sections are (id, heading, body); the policy forbids the browser any request at all."""
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in sections)
    bodies = "".join(f'<section id="{key}"><h2>{escape(heading)}</h2>{body}</section>' for key, heading, body in sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    header = f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><span class=notice>{NOTICE}</span><nav>{links}</nav></header>"
    footer = f"<footer>{NOTICE}. This file stands alone: it loads nothing from anywhere.</footer>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body><main>{header}<div class=cards>{cards}</div>{bodies}{footer}</main></body></html>\n"
    )


def card(value: str, label: str) -> str:
    return f"<div class=card><b>{escape(value)}</b><span>{escape(label)}</span></div>"


def lead(text: str) -> str:
    return f"<p class=lead>{escape(text)}</p>"


def bar(value: float, trained: bool) -> str:
    width = 100 * min(max(value, 0.0), 1.0)
    return f'<div class="bar{" trained" if trained else ""}"><i style="width:{width:.1f}%"></i></div>'


def rows(pairs: list[tuple[str, str]]) -> str:
    """A two-column table of names and values."""
    return "<table>" + "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs) + "</table>"
