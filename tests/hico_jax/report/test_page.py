"""One report with every kind of block, as a demo would fill it."""

from __future__ import annotations

import base64
import html.parser
import json
import pathlib
import re
import struct
import zlib
from typing import Any

import pytest

from hico_jax.report import page


def png(width: int, height: int) -> bytes:
    """A plain grey picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes([90 + 100 * x // width for x in range(width)]) for _ in range(height))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def example() -> page.Report:
    """Shaped like the demo's report; the numbers are made up and only test the drawing."""
    steps = list(range(0, 640, 2))
    raw = [2.6 * 0.985 ** (s / 4) + 0.02 + 0.15 * ((s * 7919 % 101) / 101) * 0.99 ** (s / 4) for s in steps]
    mean = [sum(raw[max(0, i - 12) : i + 1]) / len(raw[max(0, i - 12) : i + 1]) for i in range(len(raw))]
    kept = [1.0 if 80 < i < 96 else (i * 37 % 11) / 14 for i in range(256)]
    return {
        "title": "A small model that reads long films",
        "lead": "A tower, token merging and a language model of 0.8 M parameters were trained from nothing on this "
        "machine, on videos of 8 frames, and then asked about films of up to 2,048 frames. "
        "Every number below was measured in this run.",
        "facts": [
            {"value": "97.5%", "label": "of needles found in 64 to 1,024 frames"},
            {"value": "16×", "label": "fewer tokens than patches"},
            {"value": "7 min 12 s", "label": "from nothing to this page, on 2 cores"},
            {"value": "identical", "label": "losses after a kill -9 and a restart"},
        ],
        "sections": [
            {
                "title": "What it saw",
                "text": "Each film is a real H.264 file. A card shows for four frames, somewhere.",
                "blocks": [{"kind": "image", "src": "contact.png", "alt": "eight frames; the card is in the sixth"}],
            },
            {
                "title": "Training",
                "blocks": [
                    {
                        "kind": "lines",
                        "title": "Loss of stage 1",
                        "x_label": "step",
                        "y_label": "loss",
                        "log_y": True,
                        "half": True,
                        "marks": [(300, "killed, resumed")],
                        "caption": "Projector only. Faint: every step.",
                        "series": [
                            {"label": "raw", "x": steps, "y": raw, "faint": True, "colour": 0},
                            {"label": "mean of 25 steps", "x": steps, "y": mean, "colour": 0},
                        ],
                        "source": "metrics.jsonl",
                    },
                    {
                        "kind": "lines",
                        "title": "Accuracy",
                        "x_label": "frames",
                        "y_label": "answers right",
                        "log_x": True,
                        "percent": True,
                        "y_range": [0, 1],
                        "half": True,
                        "series": [
                            {"label": "with dropping", "x": [64, 256, 1024, 2048], "y": [0.95, 1.0, 0.97, 0.93]},
                            {"label": "without", "x": [64, 256, 1024, 2048], "y": [0.95, 0.99, 0.98, None]},
                            {"label": "needle removed", "x": [64, 256, 1024, 2048], "y": [0.12, 0.1, 0.13, 0.12]},
                        ],
                    },
                ],
            },
            {
                "title": "Needle in a haystack",
                "text": "Rows are where in the film the card shows; columns are the film's length.",
                "blocks": [
                    {
                        "kind": "heatmap",
                        "title": "Answers right by depth and length",
                        "source": "needle.json",
                        "rows": ["start", "25%", "50%", "75%", "end"],
                        "columns": ["64", "128", "256", "512", "1,024"],
                        "values": [
                            [1, 1, 0.9, 1, 0.8],
                            [1, 0.95, 1, 1, 1],
                            [0.55, 1, 1, 0.3, 1],
                            [1, 1, 0, 0.7, None],
                            [1, 1, 1, 0.9, 0.1],
                        ],
                        "x_label": "frames in the film",
                        "y_label": "where the card is",
                        "caption": "Ten questions per cell.",
                    },
                    {
                        "kind": "strip",
                        "title": "Tokens kept along the film",
                        "seconds": 512,
                        "rows": [
                            {"label": "after merging", "values": [1.0] * 256},
                            {"label": "after layer 1", "values": [0.5] * 256},
                            {"label": "after layer 3", "values": kept},
                        ],
                        "marks": [(167, "the card")],
                        "caption": "Darker is more of a clip's tokens.",
                    },
                ],
            },
            {
                "title": "What compression buys and costs",
                "blocks": [
                    {
                        "kind": "table",
                        "columns": ["kept", "chosen by", "tokens", "seconds", "colour", "shape"],
                        "rows": [
                            ["100%", "–", 4096, 1.61, "39/40", {"text": "38/40", "tone": "good"}],
                            ["25%", "attention", 1024, 0.52, "39/40", "28/40"],
                            [
                                "0%",
                                {"text": "the control", "tone": "muted"},
                                0,
                                0.08,
                                "39/40",
                                {"text": "20/40", "tone": "bad"},
                            ],
                        ],
                        "caption": "40 films of 1,024 frames, one prefill each.",
                    },
                ],
            },
            {
                "title": "Resume, export",
                "blocks": [
                    {
                        "kind": "keyvalues",
                        "items": [
                            ["killed at step", 300],
                            ["losses after the restart", "identical"],
                            ["answers after export and reload", {"text": "40/40", "tone": "good"}],
                        ],
                    },
                    {
                        "kind": "code",
                        "text": 'hico ask runs/demo/long.mp4 "what colour?" --model runs/demo/model\nmagenta',
                    },
                ],
            },
            {
                "title": "What this does not show",
                "tone": "caution",
                "blocks": [{"kind": "text", "text": "A toy world with two kinds of question.\n\nNo `Video-MME`."}],
            },
        ],
        "footer": "hico_jax 0.1.0 · `hico demo --seed 0` · 2 cores",
    }


class Reader(html.parser.HTMLParser):
    """Checks that tags nest, and keeps every tag and the text."""

    VOID = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "contact.png").write_bytes(png(64, 16))
    return tmp_path


def one(block: dict[str, Any], folder: pathlib.Path = pathlib.Path()) -> str:
    report: Any = {"title": "t", "lead": "l", "sections": [{"title": "here", "blocks": [block]}]}
    return page.render(report, folder)


def test_the_example_holds_every_kind_of_block_and_survives_json(folder: pathlib.Path) -> None:
    report = json.loads(json.dumps(example()))
    kinds = {block["kind"] for section in report["sections"] for block in section["blocks"]}
    assert kinds == set(page.BLOCKS)
    assert page.render(report, folder) == page.render(example(), folder)


def test_the_page_is_well_formed_and_says_what_it_was_given(folder: pathlib.Path) -> None:
    reader = read(page.write(example(), folder / "report.html").read_text())
    words = ["97.5%", "after layer 3", "killed, resumed", "the control", "1,024", "needle.json", "Ten questions"]
    assert [w for w in words if w not in reader.text] == []
    assert sum(tag == "svg" for tag, _ in reader.tags) == 4
    assert sorted(p.name for p in folder.iterdir()) == ["contact.png", "report.html"]


def test_nothing_is_loaded_from_anywhere(folder: pathlib.Path) -> None:
    text = page.render(example(), folder)
    reader = read(text)
    assert {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "use", "image"} == set()
    assert all((attrs["src"] or "").startswith("data:image/png;base64,") for tag, attrs in reader.tags if tag == "img")
    assert "url(" not in text
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, not a place


def test_a_picture_is_inside_byte_for_byte(folder: pathlib.Path) -> None:
    (attrs,) = [attrs for tag, attrs in read(page.render(example(), folder)).tags if tag == "img"]
    data = base64.b64decode((attrs["src"] or "").split(",")[1])
    assert data == (folder / "contact.png").read_bytes()
    assert one({"kind": "image", "src": attrs["src"], "alt": ""}).count(attrs["src"] or "?") == 1


EVIL = "</p></title><script>alert(1)</script>\"'&"


def test_every_text_is_escaped(folder: pathlib.Path) -> None:
    def poisoned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poisoned(v, k) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [poisoned(v, key) for v in value]
        return value + EVIL if isinstance(value, str) and key not in ("kind", "src", "tone") else value

    report = example()
    for section in report["sections"]:
        if "tone" in section:
            assert section["tone"] == "caution"
    reader = read(page.render(poisoned(report), folder))
    assert not [tag for tag, _ in reader.tags if tag == "script"]
    assert reader.text.count("alert(1)") > 60
    assert not [attrs for _, attrs in reader.tags for name in attrs if name.startswith("on")]


def test_a_source_stays_a_file_beside_the_report() -> None:
    text = one({"kind": "text", "text": "x", "source": "javascript:alert(1)"})
    (href,) = re.findall(r'class="source" href="([^"]*)"', text)
    assert href == "javascript%3Aalert%281%29"


def test_numbers_stand_to_the_right_and_words_to_the_left() -> None:
    rows = [["1", 1234, "39/40", "0.3 s"], ["2", None, "97% (90–99)", "words"]]
    text = one({"kind": "table", "columns": ["a", "b", "c", "d"], "rows": rows})
    assert "<th>a</th>" in text
    assert '<th class="n">b</th><th class="n">c</th><th>d</th>' in text
    assert '<td class="n">1,234</td>' in text
    assert '<td class="n">–</td>' in text


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"kind": "pie"}, "kind 'pie'; it must be one of text, code"),
        ({"kind": "table", "columns": ["a"]}, "'here': its table block has no 'rows'"),
        ({"kind": "table", "columns": ["a"], "rows": [[1, 2]]}, "1 columns .a. but a row of 2"),
        ({"kind": "image", "src": "gone.png", "alt": ""}, "gone.png is not there"),
        ({"kind": "image", "src": "/etc/passwd", "alt": ""}, "not the name of a picture"),
        ({"kind": "image", "src": "data:text/html;base64,AAAA", "alt": ""}, "not the name of a picture"),
        ({"kind": "lines", "title": "L", "series": [{"label": "s", "x": [1, 2], "y": [1]}]}, "2 x and 1 y"),
    ],
)
def test_a_mistake_is_named(block: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        one(block, tmp_path)


def test_sections_of_one_name_have_links_of_their_own() -> None:
    report: Any = {"title": "t", "lead": "l", "sections": [{"title": "Same"}, {"title": "Same"}, {"title": "é"}]}
    ids = [attrs["id"] for tag, attrs in read(page.render(report)).tags if tag == "section"]
    assert ids == ["same", "same-1", "part"]
