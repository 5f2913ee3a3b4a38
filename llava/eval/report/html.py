"""One HTML file that holds a table, its plots, kept tokens and conditions, and loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from llava.eval.engine.schema import Record
from llava.eval.report.paper_table import (
    DEMO,
    describe,
    full_grid,
    measured_grid,
    notes,
    published_grid,
)
from llava.eval.tables.fill import Filled

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr.absent td { color: #888 }
img { max-width: 100%; height: auto }
.demo { background: #fff3cd; border-left: .3rem solid #d39e00; padding: .6rem 1rem }
dt { font-weight: 600 }
dd { margin: 0 0 .4rem 1rem; overflow-wrap: anywhere }
figure { margin: 1rem 0 }
"""


def to_html(
    filled: Filled, conditions: Record, pictures: Mapping[str, Path], demo: bool = False
) -> str:
    """The report; `pictures` are PNG files by the caption they get, taken into the file."""
    title = escape(filled.table.title)
    body = [f"<h1>{title}</h1>"]
    if demo:
        body += [f'<p class="demo">{escape(DEMO)}</p>', _table(filled, *measured_grid(filled))]
        body += ["<h2>Published figures, not comparable with the demo's</h2>"]
        body += [_table(filled, *published_grid(filled))]
    else:
        body += ["<p>Cells: published / ours ± standard error / gap (ours minus published).</p>"]
        body += [_table(filled, *full_grid(filled))]
    body += [f"<p>{escape(note)}</p>" for note in notes(filled, demo)]
    for caption, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        body.append(f"<figure><figcaption>{escape(caption)}</figcaption>{image}</figure>")
    body.append("<h2>Conditions</h2><dl>")
    for name, text in describe(conditions):
        body.append(f"<dt>{escape(name)}</dt><dd>{escape(str(text))}</dd>")
    body.append("</dl>")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    page = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{page}\n</body></html>\n'


def _table(filled: Filled, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    for row, line in zip(filled.rows, lines, strict=True):
        mark = ' class="absent"' if row.unavailable is not None else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'
