"""Pieces of a self-contained HTML page: no links, no scripts, figures inside, all text escaped.

Light and dark follow the reader's system; on paper it is always light.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_CSS = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5f6368; --paper: #ffffff;
  --line: #d9dce0; --shade: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a2a7ad; --paper: #16181b;
  --line: #3a3e44; --shade: #202327; } }
@media print { :root { color-scheme: light; --ink: #000000; --soft: #444444; --paper: #ffffff;
  --line: #bbbbbb; --shade: #ffffff; } body { padding: 0; max-width: none; }
  figure, table, dl { break-inside: avoid; } h2 { break-after: avoid; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem;
  border-bottom: 1px solid var(--line); }
p { max-width: 46rem; margin: .6rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0 1.6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .9rem; }
.number { text-align: right; padding-left: .9rem; }
.note, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0 2rem; }
figure img { display: block; width: 100%; max-width: 46rem; height: auto; background: #ffffff;
  border-radius: 6px; }
pre { background: var(--shade); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { font-weight: 600; cursor: pointer; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0;
  font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""
_LONG = 40


def page(title: str, body: Sequence[str]) -> str:
    """A whole document around pieces that the functions below made."""
    content = "\n".join(body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{_text(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"{content}\n</main>\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{_text(text)}</h{level}>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{_text(text)}</p>"


def code(text: str) -> str:
    """A command or other text to be read literally."""
    return f"<pre><code>{_text(text)}</code></pre>"


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    text_columns: int = 1,
    note: str = "",
) -> str:
    """A table; the first `text_columns` columns hold text, the others numbers.

    One of more than forty rows is folded, so that what follows it is seen.

    Example:
      >>> "<td>a&lt;b</td>" in table("t", ["method"], [["a<b"]])
      True
    """

    def line(cells: Sequence[str], tag: str) -> str:
        classes = ["" if index < text_columns else ' class="number"' for index in range(len(cells))]
        drawn = [
            f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(classes, cells, strict=True)
        ]
        return f"<tr>{''.join(drawn)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    below = f'\n<p class="note">{_text(note)}</p>' if note else ""
    drawn = (
        f'<div class="scroll"><table>\n<caption>{_text(caption)}</caption>\n'
        f"<thead>{line(header, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>{below}</div>"
    )
    if len(rows) <= _LONG:
        return drawn
    summary = f"<summary>{_text(caption)}: {len(rows)} rows</summary>"
    return f"<details>{summary}\n{drawn}</details>"


def figure(caption: str, path: Path | str | Sequence[Path]) -> str:
    """A figure with its image inside the page; of several files of one figure, the SVG.

    Args:
      caption: Plain text below the figure.
      path: An .svg or .png file, or several of the same figure.

    Returns:
      HTML.

    Raises:
      ValueError: If no file is an SVG or a PNG.
    """
    files = [Path(path)] if isinstance(path, (str, Path)) else [Path(item) for item in path]
    kinds = {".svg": "image/svg+xml", ".png": "image/png"}
    for suffix, kind in kinds.items():
        for file in files:
            if file.suffix == suffix:
                data = base64.b64encode(file.read_bytes()).decode()
                # As an image: whatever the file holds cannot run, and ids cannot clash.
                source = f"data:{kind};base64,{data}"
                shown = _text(caption)
                return (
                    f'<figure><img alt="{shown}" src="{source}"/>'
                    f"<figcaption>{shown}</figcaption></figure>"
                )
    raise ValueError(f"a figure is an .svg or .png file, got {[file.name for file in files]}")


def definitions(title: str, items: Mapping[str, Any]) -> str:
    """A titled list of names and values."""
    entries = "\n".join(
        f"<dt>{_text(key)}</dt><dd>{_text(_shown(value))}</dd>" for key, value in items.items()
    )
    return f"<h3>{_text(title)}</h3>\n<dl>\n{entries}\n</dl>"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)


def _text(text: Any) -> str:
    """Escaped for elements and attributes; control characters, which HTML forbids, are shown."""
    kept = "".join(
        char if char in "\n\t" or (char.isprintable() or ord(char) > 0x9F) else "\ufffd"
        for char in str(text)
    )
    return escape(kept, quote=True)
