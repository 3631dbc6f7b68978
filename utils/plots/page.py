"""A run as one page that can be sent: a self-contained HTML file, with its pictures inside."""
from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.files import write_text
from utils.plots.style import narrow_form

PICTURE_WIDTH = 480  # pixels, of a picture of a pair
STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --soft: #f4f5f7; --shade: #0006 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --paper: #16181c; --line: #3a3f47; --soft: #22262c; --shade: #fff5 }
  .chart { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen }  /* a chart on the page's own dark ground */
}
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
       background: var(--paper) }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.headline { font-size: 1.15rem; font-weight: 600 }
img { max-width: 100%; height: auto; border-radius: 4px }
figure { margin: 0 0 1.5rem } figcaption { font-size: .9rem; opacity: .8; overflow-wrap: anywhere }
/* A shade at the right edge shows that a table goes on; the second layer moves with the table, and covers it at the
   end. The first column stays. */
.wide { overflow-x: auto; background: linear-gradient(270deg, var(--paper) 1rem, transparent) 100% 0/3rem local,
                                      linear-gradient(270deg, var(--shade), transparent) 100% 0/1rem scroll;
        background-repeat: no-repeat }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: .9rem }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; min-width: 5rem;
                                 white-space: normal; background: var(--paper) }
pre { background: var(--soft); padding: .8rem; border-radius: 4px; font-size: .85rem; white-space: pre-wrap;
      overflow-wrap: anywhere }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem } .pair div { font-weight: 600; font-size: .9rem }
.pair img { width: 100%; display: block }
@media (max-width: 600px) { .pair { grid-template-columns: 1fr } }
"""


@dataclass
class Page:
    """What the page shows, from top to bottom; parts that are empty are left out."""

    title: str
    facts: Sequence[str]                                  # what was asked, what was reached
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # heading -> rows of equal keys
    pictures: Mapping[str, Path] = field(default_factory=dict)  # caption -> file; a file that is missing is left out
    pairs: Sequence[tuple[str, Sequence[np.ndarray]]] = ()  # name of an image -> (H, W, 3) uint8 RGB before, slim
    commands: Sequence[str] = ()
    headline: str = ""                                    # what came of it, in a sentence

    def write(self, path: Path) -> Path:
        """Write the page, atomically."""
        parts = [f"<h1>{escape(self.title)}</h1>"]
        parts += [f'<p class="headline">{escape(self.headline)}</p>'] if self.headline else []
        parts += [f"<p>{escape(fact)}</p>" for fact in self.facts if fact]
        for heading, rows in self.tables.items():
            parts += [f"<h2>{escape(heading)}</h2>", _table(rows)] if rows else []
        for caption, file in self.pictures.items():
            if file.is_file():
                parts += [f"<h2>{escape(caption)}</h2>", _chart(file, caption)]
        if self.pairs:
            parts.append("<h2>Detections before and after</h2>")
            parts += [_pair(name, images) for name, images in self.pairs]
        if self.commands:
            parts += ["<h2>Commands</h2>", f"<pre>{escape(chr(10).join(self.commands))}</pre>"]
        head = ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
                '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
                f"<title>{escape(self.title)}</title><style>{STYLE}</style></head><body>")
        write_text(path, "\n".join([head, *parts, "</body></html>\n"]))
        return path


def headline(before: Mapping[str, Any], after: Mapping[str, Any], measured: str) -> str:
    """What a slim model gains and costs, in a sentence.

    before, after: the two models' ms (an image), mAP50-95 val and MB. measured: how ms was, as "PyTorch, 2 threads".
    """
    def both(key: str) -> str:
        return f"{digits(before[key])} -> {digits(after[key])}"

    return (f"{before['ms'] / after['ms']:.2f} times as fast ({both('ms')} ms, {measured}), "
            f"mAP50-95 {both('mAP50-95 val')}, {both('MB')} MB")


def digits(value: float) -> str:
    """A number in three digits, of which as many are decimals as that leaves: 0.649, 7.13, 78.2, 1,234."""
    return f"{value:,.{sum(abs(value) < limit for limit in (0.9995, 9.995, 99.95))}f}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys; a column that is empty in all of them is left out."""
    def show(value: Any) -> str:
        if isinstance(value, float):
            return digits(value)
        return f"{value:,}" if isinstance(value, int) else escape(str(value))

    keys = [key for key in rows[0] if any(row[key] != "" for row in rows)]
    head = "".join(f"<th>{escape(key)}</th>" for key in keys)
    body = "".join("<tr>" + "".join(f"<td>{show(row[key])}</td>" for key in keys) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _chart(file: Path, caption: str) -> str:
    """A chart, and its narrow form on a phone where it has one."""
    wide, narrow = (_embedded(form.read_bytes(), "png") if form.is_file() else "" for form in (file, narrow_form(file)))
    phone = f'<source media="(max-width: 600px)" srcset="{narrow}">' if narrow else ""
    return f'<figure><picture>{phone}<img class="chart" src="{wide}" alt="{escape(caption)}"></picture></figure>'


def _pair(name: str, images: Sequence[np.ndarray]) -> str:
    """The same image twice, side by side; on a phone one below the other."""
    both = "".join(f'<div>{which}<img src="{_jpeg(image)}" alt="{escape(f"{name}, {which}")}"></div>'
                   for image, which in zip(images, ("before", "slim"), strict=True))
    return f'<figure><div class="pair">{both}</div><figcaption>{escape(name)}</figcaption></figure>'


def _jpeg(image: np.ndarray) -> str:
    """An image (H, W, 3) as a data URI, at most PICTURE_WIDTH pixels wide."""
    picture = Image.fromarray(image)
    picture.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
    picture.save(stream := io.BytesIO(), "JPEG", quality=80)
    return _embedded(stream.getvalue(), "jpeg")


def _embedded(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
