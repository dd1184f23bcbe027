"""One self-contained HTML page from a dictionary of results.

In: a `Report`, plain JSON values, so the same file that a run saves can be drawn again. Out: `report.html`,
which loads nothing (its content security policy says so), runs no script and escapes every text.
"""

from __future__ import annotations

import base64
import html
import mimetypes
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from hico_jax.report import charts
from hico_jax.report.style import PAGE, STYLE


class Cell(TypedDict):
    """A table cell with a meaning: `good` and `bad` are coloured, `muted` is quiet, `strong` is bold."""

    text: str
    tone: Literal["good", "bad", "muted", "strong"]


Value = str | int | float | bool | None | Cell


class Block(TypedDict):
    """What every block may have. `half` puts two blocks side by side where the screen is wide enough."""

    caption: NotRequired[str]  # under the block: what to read in it
    source: NotRequired[str]  # a file beside the report that holds the numbers, for example "needle.json"
    half: NotRequired[bool]


class Text(Block):
    """Paragraphs, separated by empty lines. `backticks` become code."""

    kind: Literal["text"]
    text: str


class Code(Block):
    """Text to be copied as it is: commands, answers, a log."""

    kind: Literal["code"]
    text: str


class KeyValues(Block):
    """Names and values, in order."""

    kind: Literal["keyvalues"]
    items: Sequence[Sequence[Value]]  # [name, value] each


class Table(Block):
    """Rows under headings. The first column names the row; numbers after it are set to the right."""

    kind: Literal["table"]
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]


class Line(TypedDict):
    """One line of a `Lines` chart; None breaks it, `faint` draws it thin behind the others."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    faint: NotRequired[bool]
    colour: NotRequired[int]  # the same number, the same colour: a faint line and its mean


class Lines(Block):
    """A line chart; `marks` are vertical lines at [x, word]."""

    kind: Literal["lines"]
    title: str
    series: Sequence[Line]
    x_label: NotRequired[str]
    y_label: NotRequired[str]
    log_y: NotRequired[bool]
    log_x: NotRequired[bool]
    percent: NotRequired[bool]  # y is a share: 0.5 is printed 50%
    y_range: NotRequired[Sequence[float]]
    marks: NotRequired[Sequence[tuple[float, str]]]


class Heatmap(Block):
    """`values[row][column]`, coloured between `low` and `high`; None is blank. Shares print as percentages."""

    kind: Literal["heatmap"]
    title: str
    values: Sequence[Sequence[float | None]]
    rows: Sequence[str]
    columns: Sequence[str]
    x_label: NotRequired[str]
    y_label: NotRequired[str]
    low: NotRequired[float]
    high: NotRequired[float]
    percent: NotRequired[bool]


class StripRow(TypedDict):
    """How much of each clip is kept at one place, 0 to 1, in film order."""

    label: str
    values: Sequence[float]


class Strip(Block):
    """Rows along a film of `seconds`; `marks` are [second, word]."""

    kind: Literal["strip"]
    title: str
    seconds: float
    rows: Sequence[StripRow]
    marks: NotRequired[Sequence[tuple[float, str]]]


class Image(Block):
    """A picture: a file (relative to the report's folder) or a data URI. `alt` says what is seen."""

    kind: Literal["image"]
    src: str
    alt: str


AnyBlock = Text | Code | KeyValues | Table | Lines | Heatmap | Strip | Image


class Section(TypedDict):
    """A heading, a sentence or two, and blocks. `tone` "caution" frames it: limits, controls that failed."""

    title: str
    text: NotRequired[str]
    blocks: NotRequired[Sequence[AnyBlock]]
    tone: NotRequired[Literal["plain", "caution"]]


class Fact(TypedDict):
    """One of the few numbers at the top."""

    value: str
    label: str


class Report(TypedDict):
    """The whole page, top to bottom."""

    title: str
    lead: str  # what this is, in two or three sentences
    sections: Sequence[Section]
    facts: NotRequired[Sequence[Fact]]
    footer: NotRequired[str]  # version, command, machine, date


def write(report: Report, path: str | pathlib.Path) -> pathlib.Path:
    """Render beside the files the report names, in one move: a reader never sees half a page."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(render(report, path.parent), encoding="utf-8")
    return partial.replace(path)


def render(report: Report, folder: pathlib.Path = pathlib.Path()) -> str:
    """The page as text. Pictures are read from `folder` and put inside.

    Raises:
      ValueError: a block of an unknown kind, with values that do not fit, or with no such picture.
    """
    sections = list(zip(_slugs([section["title"] for section in report["sections"]]), report["sections"], strict=True))
    title = html.escape(report["title"])
    facts = "".join(_pair(fact["label"], fact["value"]) for fact in report.get("facts", ()))
    links = "".join(f'<a href="#{slug}">{_inline(section["title"])}</a>' for slug, section in sections)
    header = f"<h1>{_inline(report['title'])}</h1>{_paragraphs(report['lead'], 'lead')}"
    header += f'<dl class="facts">{facts}</dl>' if facts else ""
    body = "".join(_section(section, slug, folder) for slug, section in sections)
    footer = _paragraphs(report.get("footer", ""))
    return PAGE.format(
        title=title,
        style=STYLE + charts.STYLE,
        header=f"{header}<nav>{links}</nav>",
        body=body,
        footer=f"<footer>{footer}</footer>" if footer else "",
    )


def _section(section: Section, slug: str, folder: pathlib.Path) -> str:
    blocks = "".join(_block(block, section["title"], folder) for block in section.get("blocks", ()))
    kind = "part caution" if section.get("tone") == "caution" else "part"
    heading = f"<h2>{_inline(section['title'])}</h2>{_paragraphs(section.get('text', ''))}"
    return f'<section class="{kind}" id="{slug}">{heading}<div class="blocks">{blocks}</div></section>\n'


def _block(block: AnyBlock, where: str, folder: pathlib.Path) -> str:
    kind = block["kind"]
    if kind not in BLOCKS:
        raise ValueError(f"section {where!r} has a block of kind {kind!r}; it must be one of {', '.join(BLOCKS)}")
    try:
        body = BLOCKS[kind](block, folder)
    except KeyError as missing:
        raise ValueError(f"section {where!r}: its {kind} block has no {missing}") from None
    name = f'<p class="name">{_inline(str(block["title"]))}</p>' if "title" in block else ""
    note = _inline(block.get("caption", ""))
    if source := block.get("source"):
        note += f' <a class="source" href="{urllib.parse.quote(source)}">{html.escape(source)}</a>'
    classes = f"block {kind} half" if block.get("half") else f"block {kind}"
    caption = f"<figcaption>{note.strip()}</figcaption>" if note else ""
    return f'<figure class="{classes}">{name}{body}{caption}</figure>'


def _text(block: Any, _: pathlib.Path) -> str:
    return _paragraphs(block["text"])


def _code(block: Any, _: pathlib.Path) -> str:
    return f"<pre><code>{html.escape(block['text'])}</code></pre>"


def _keyvalues(block: Any, _: pathlib.Path) -> str:
    return f"<dl>{''.join(_pair(name, value) for name, value in block['items'])}</dl>"


def _table(block: Any, _: pathlib.Path) -> str:
    columns = block["columns"]
    for row in block["rows"]:
        if len(row) != len(columns):
            raise ValueError(
                f"a table has {len(columns)} columns ({', '.join(columns)}) but a row of {len(row)}: {row}"
            )
    right = [i > 0 and all(_numeric(row[i]) for row in block["rows"]) for i in range(len(columns))]
    sides = [' class="n"' if r else "" for r in right]
    head = "".join(f"<th{side}>{_inline(name)}</th>" for side, name in zip(sides, columns, strict=True))
    rows = ("".join(f"<td{side}>{_shown(v)}</td>" for side, v in zip(sides, row, strict=True)) for row in block["rows"])
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _lines(block: Any, _: pathlib.Path) -> str:
    series = [
        charts.Series(s["label"], s["x"], s["y"], s.get("faint", False), s.get("colour")) for s in block["series"]
    ]
    y_range = tuple(block["y_range"]) if block.get("y_range") else None
    options = _only(block, "title", "x_label", "y_label", "log_y", "log_x", "percent", "marks")
    return charts.line_chart(series, y_range=y_range, **options)


def _heatmap(block: Any, _: pathlib.Path) -> str:
    options = _only(block, "title", "rows", "columns", "x_label", "y_label", "low", "high", "percent")
    return f'<div class="scroll">{charts.heatmap(block["values"], **options)}</div>'


def _strip(block: Any, _: pathlib.Path) -> str:
    rows = [(row["label"], row["values"]) for row in block["rows"]]
    return f'<div class="scroll">{charts.strip(rows, **_only(block, "title", "seconds", "marks"))}</div>'


def _image(block: Any, folder: pathlib.Path) -> str:
    return f'<img src="{_data_uri(block["src"], folder)}" alt="{html.escape(block["alt"])}">'


BLOCKS: dict[str, Callable[[Any, pathlib.Path], str]] = {
    "text": _text,
    "code": _code,
    "keyvalues": _keyvalues,
    "table": _table,
    "lines": _lines,
    "heatmap": _heatmap,
    "strip": _strip,
    "image": _image,
}


def _data_uri(src: str, folder: pathlib.Path) -> str:
    if re.fullmatch(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", src):
        return src
    path = folder / src
    kind = mimetypes.guess_type(path.name)[0] or ""
    if not kind.startswith("image/"):
        raise ValueError(f"{src[:80]!r} is not the name of a picture (png, jpg, webp, svg) nor a data:image URI")
    if not path.is_file():
        raise ValueError(f"the picture {path} is not there; write it before the report")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _only(block: Any, *names: str) -> dict[str, Any]:
    return {name: block[name] for name in names if name in block}


def _paragraphs(text: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return "".join(f"<p{name}>{_inline(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip())


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _pair(name: Value, value: Value) -> str:
    return f"<div><dt>{_shown(name)}</dt><dd>{_shown(value)}</dd></div>"


def _shown(value: Value) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        return f'<span class="{html.escape(value["tone"])}">{_inline(value["text"])}</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else _inline(value)


def _numeric(value: Value) -> bool:
    text = value["text"] if isinstance(value, dict) else value
    if isinstance(text, str):
        return bool(re.fullmatch(r"|–|[-+~≤≥<>]?\s?\d.{0,15}", text))  # "39/40", "0.31 s", "97% (90–99)"
    return not isinstance(text, bool)


def _slugs(titles: Sequence[str]) -> list[str]:
    slugs: list[str] = []
    for title in titles:
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "part"
        slugs.append(slug if slug not in slugs else f"{slug}-{len(slugs)}")
    return slugs
