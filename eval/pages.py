"""A report as report.md and as report.html, from the same sections."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-variant-numeric:tabular-nums}td,th{border:1px solid #ccc;padding:.25em .6em;
text-align:left}th{background:#f4f4f4}img{max-width:100%}.warning{background:#fff0d8;padding:.5em 1em;border-left:4px solid
#d90}footer{color:#777;font-size:.9em}"""


@dataclass(frozen=True)
class Section:
    """A heading, sentences, and a table or a picture under it."""

    title: str
    text: str = ""
    frame: object = None
    picture: str | None = None


def to_markdown(
    title: str, about: str, warnings: Sequence[str], sections: Sequence[Section], foot: str
) -> str:
    """report.md."""
    lines = [f"# {title}", "", about]
    lines += ["", *(f"> **Warning.** {each}\n>" for each in warnings)] if warnings else []
    for section in sections:
        lines += ["", f"## {section.title}"]
        lines += ["", section.text] if section.text else []
        if section.frame is not None:
            lines += ["", section.frame.to_markdown(index=False, disable_numparse=True)]
        if section.picture is not None:
            lines += ["", f"![{section.title}]({section.picture})"]
    return "\n".join([*lines, "", foot, ""])


def to_html(
    title: str,
    about: str,
    warnings: Sequence[str],
    sections: Sequence[Section],
    foot: str,
    pictures: Mapping[str, bytes],
) -> str:
    """report.html: one file with its pictures in it, and no script."""
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>"]
    parts += [f'<p class="warning"><b>Warning.</b> {html.escape(each)}</p>' for each in warnings]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(section.text)}</p>"] if section.text else []
        if section.frame is not None:
            parts.append(section.frame.to_html(index=False, border=0))
        if section.picture is not None:
            data = base64.b64encode(pictures[section.picture]).decode()
            parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f"<!doctype html><html><head>{head}</head><body>{body}<footer><p>{html.escape(foot)}</p></footer></body></html>\n"
