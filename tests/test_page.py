"""report.html: one file that shows everything by itself, also in a real browser where there is one."""
from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.plots.page import Page, digits, headline
from utils.plots.slimming import plot_kept, plot_tradeoff
from utils.plots.style import class_colour

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
VOID = {"meta", "link", "img", "source"}


class Reader(HTMLParser):
    """Tags that are open, attributes that refer to something, and the texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.images: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action")]
        if tag == "img":
            assert dict(attrs)["alt"]
            self.images.append(dict(attrs)["src"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    models = [{"model": "before", "ms": 5.0, "map": 0.5, "no reason": ""},
              {"model": "slim <b>", "ms": 3.0, "map": 0.49, "no reason": ""}]
    picture = plot_tradeoff(models, folder / "tradeoff.png")
    layers = [{"layer": f"model.{i}.bn", "original": 64, "remaining": 32, "prunable": True} for i in range(57)]
    kept = plot_kept(layers, folder / "channels.png")
    cost = [{"figure": "ms an image (onnxruntime on the CPU, batch 16)", "dense": 1234.5, "after": 1.5, "left": 0.5}]
    pairs = [(f"{i} & <i>.jpg", [rng.integers(0, 255, (400, 900, 3), np.uint8)] * 2) for i in range(10)]
    return Page("A <title>", ["asked flops=0.5", ""], {"Models": models, "None": [], "Cost": cost},
                {"Accuracy": picture, "Missing": folder / "missing.png", "Channels": kept}, pairs,
                ["python slim.py --name 'a & b'"], "1.67 times as <fast>").write(folder / "report.html")


@pytest.mark.slow
def test_it_is_whole_and_refers_to_nothing_outside(page):
    text = page.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and len(reader.images) == 2 + 2 * 10
    assert len(reader.references) == 1 + 3 + 2 * 10  # the icon; the channels have a narrow form
    assert all(reference.startswith("data:") for reference in reader.references)
    assert not re.search(r"https?://|url\(|@import|<script", text)
    words = " ".join(reader.words)
    assert all(word in words for word in ("slim <b>", "A <title>", "3 & <i>.jpg", "--name 'a & b'", "0.490",
                                          "1.67 times as <fast>", "5.00"))
    assert reader.words.count("before") == reader.words.count("slim") + 1 == 11  # in the table, above each picture
    assert not any(word in words for word in ("Missing", "None", "no reason"))
    for word in ('name="viewport"', "max-width: 100%", "prefers-color-scheme: dark"):
        assert word in text
    for image in reader.images:
        head, _, content = image.partition(",")
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as opened:
            opened.load()
            assert head == f"data:image/{opened.format.lower()};base64" and opened.width > 100
    assert page.stat().st_size < 5e6


@pytest.mark.slow
def test_a_browser_shows_its_images(page, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    sizes = "[...document.images].map(i => i.naturalWidth * i.clientWidth).join(' ')"
    beyond = ("Math.max(document.documentElement.scrollWidth - innerWidth, "
              "...[...document.querySelectorAll('td:first-child')].map(cell => cell.clientWidth - innerWidth / 2))")
    probe = f"<script>onload = () => {{ parent.document.title += {sizes} + ' beyond ' + ({beyond}) }}</script>"
    text = page.read_text(encoding="utf-8").replace("</head>", probe + "</head>")
    for width in (375, 1280):  # a phone, a desk; the browser's own window may not be as narrow
        frame = f'<title></title><iframe width="{width}" height="800" srcdoc="{escape(text)}"></iframe>'
        (tmp_path / "page.html").write_text(f'<meta charset="utf-8">{frame}', encoding="utf-8")
        done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                               "--window-size=1400,900", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                               (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
        found = re.search(r"<title>([\d ]+) beyond (-?[\d.]+)</title>", done.stdout)
        assert found and found[1].count(" ") == 21 and all(int(n) > 0 for n in found[1].split())
        # Nothing is wider than the page: tables scroll by themselves. The column that stays leaves room for the others.
        assert float(found[2]) <= 0
        assert "CONSOLE" not in done.stderr


@pytest.mark.parametrize("value,text", [
    (0.0, "0.000"), (0.6354, "0.635"), (0.9999, "1.00"), (7.125, "7.12"), (9.999, "10.0"), (78.16, "78.2"),
    (99.96, "100"), (1234.5, "1,234"), (-0.02, "-0.020"), (float("nan"), "nan")])
def test_digits(value, text):
    assert digits(value) == text


def test_headline():
    before = {"model": "before", "mAP50-95 val": 0.649, "parameters": 1765270, "MB": 7.1, "ms": 78.0}
    after = {"model": "slim", "mAP50-95 val": 0.6354, "parameters": 372157, "MB": 1.49, "ms": 50.3}
    assert headline(before, after, "PyTorch, 2 threads") == (
        "1.55 times as fast (78.0 -> 50.3 ms, PyTorch, 2 threads), mAP50-95 0.649 -> 0.635, 7.10 -> 1.49 MB")


def test_points_at_nothing_are_drawn(tmp_path):
    assert plot_tradeoff([{"model": "untrained", "ms": 5.0, "map": 0.0}], tmp_path / "a.png").is_file()


@pytest.mark.slow
def test_pictures_show_what_each_model_finds(tiny, teacher, monkeypatch):
    """With detections: a caption and a box in the colour of its class, enlarged alike. No grey around the picture."""
    import torch

    import val
    from models import checkpoint
    from utils.data.config import read_data
    from utils.data.loader import validation_loader

    model = checkpoint.load(teacher)
    loader = validation_loader(read_data(str(tiny)), "val", 64, 4, 32, workers=0)
    beyond = torch.tensor([[-9.0, -9, 200, 200, 0.875, 1]])  # of the picture, as a box in the grey around it
    found = [torch.tensor([[20.0, 20, 60, 60, 0.875, 1]]), torch.zeros(0, 6), beyond, torch.zeros(0, 6)]
    monkeypatch.setattr(val, "nms", lambda decoded, *_: found[:len(decoded)])
    shown = val.pictures([model, model], loader, torch.device("cpu"), count=5)
    assert [name for name, _ in shown] == [f"{i:03d}.png" for i in range(5)]
    batch = next(iter(loader))
    assert batch.images.shape[2:] == (64, 96)  # letterboxed
    pixels = batch.images.permute(0, 2, 3, 1).numpy()[:, 8:56, 16:80]
    for i, (_, (first, second)) in enumerate(shown):
        assert first.shape == (7 * 48, 7 * 64, 3) and np.array_equal(first, second)
        if i < 4:
            enlarged = pixels[i].repeat(7, 0).repeat(7, 1)
            assert np.array_equal(first, enlarged) == (i % 2 == 1)
    assert (shown[2][1][0][200, 0] == class_colour(1)).all()  # the part of its outline that is beyond lies on the edge
