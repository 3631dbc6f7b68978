"""report.html: one file that shows everything by itself, also in a real browser where there is one."""
from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.plots.page import Page
from utils.plots.slimming import plot_tradeoff

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
VOID = {"meta", "link", "img"}


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
    models = [{"model": "before", "ms": 5.0, "map": 0.5}, {"model": "slim <b>", "ms": 3.0, "map": 0.49}]
    picture = plot_tradeoff(models, folder / "tradeoff.png")
    pairs = [(f"{i} & <i>.jpg", [rng.integers(0, 255, (400, 900, 3), np.uint8)] * 2) for i in range(10)]
    return Page("A <title>", ["asked flops=0.5", ""], {"Models": models, "None": []},
                {"Accuracy": picture, "Missing": folder / "missing.png"}, pairs,
                ["python slim.py --name 'a & b'"]).write(folder / "report.html")


def test_it_is_whole_and_refers_to_nothing_outside(page):
    text = page.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and len(reader.images) == 1 + 2 * 10
    assert all(reference.startswith("data:") for reference in reader.references)
    assert not re.search(r"https?://|url\(|@import|<script", text)
    words = " ".join(reader.words)
    assert all(word in words for word in ("slim <b>", "A <title>", "3 & <i>.jpg", "--name 'a & b'", "0.490"))
    assert "Missing" not in words and "None" not in words
    for word in ('name="viewport"', "max-width: 100%", "prefers-color-scheme: dark"):
        assert word in text
    for image in reader.images:
        head, _, content = image.partition(",")
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as opened:
            opened.load()
            assert head == f"data:image/{opened.format.lower()};base64" and opened.width > 100
    assert page.stat().st_size < 5e6


def test_a_browser_shows_its_images(page, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    sizes = "[...document.images].map(i => i.naturalWidth * i.clientWidth).join(' ')"
    probe = f"<script>onload = () => {{ document.title = {sizes} }}</script>"
    (tmp_path / "page.html").write_text(page.read_text(encoding="utf-8") + probe, encoding="utf-8")
    for width in (390, 1280):  # a phone, a desk
        done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                               f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                               (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
        found = re.search(r"<title>([\d ]+)</title>", done.stdout)
        assert found and found[1].count(" ") == 20 and all(int(n) > 0 for n in found[1].split())
        assert "CONSOLE" not in done.stderr


def test_points_at_nothing_are_drawn(tmp_path):
    assert plot_tradeoff([{"model": "untrained", "ms": 5.0, "map": 0.0}], tmp_path / "a.png").is_file()


@pytest.mark.slow
def test_pictures_show_what_each_model_finds(tiny, teacher, monkeypatch):
    """With detections: a caption and a box in the colour of its class, enlarged alike."""
    import torch

    import val
    from models import checkpoint
    from utils.data.config import read_data
    from utils.data.loader import validation_loader

    model = checkpoint.load(teacher)
    loader = validation_loader(read_data(str(tiny)), "val", 64, 4, 32, workers=0)
    found = [torch.tensor([[4.0, 4, 40, 40, 0.875, 1]]), torch.zeros(0, 6)]
    monkeypatch.setattr(val, "nms", lambda decoded, *_: [found[i % 2] for i in range(len(decoded))])
    shown = val.pictures([model, model], loader, torch.device("cpu"), count=5)
    assert [name for name, _ in shown] == [f"{i:03d}.png" for i in range(5)]
    pixels = next(iter(loader)).images.permute(0, 2, 3, 1).numpy()
    for i, (_, (first, second)) in enumerate(shown):
        times = first.shape[1] // pixels[0].shape[1]
        enlarged = pixels[i % 4].repeat(times, 0).repeat(times, 1) if i < 4 else None
        assert times > 1 and np.array_equal(first, second)
        if enlarged is not None:
            assert np.array_equal(first, enlarged) == (i % 2 == 1)
