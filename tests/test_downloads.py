"""Downloads against a local server: slow, cut off, missing, wrong, and archives that want out."""
from __future__ import annotations

import io
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import utils.downloads as downloads
from models import checkpoint
from models.yolo import Model
from utils.data.config import read_data
from utils.errors import UserError


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Serves what `pages` holds: (status, body, bytes that are really sent, seconds of silence before them)."""
    pages: dict[str, tuple[int, bytes, int | None, float]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body, sent, pause = pages.get(self.path, (404, b"", None, 0.0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            time.sleep(pause)
            self.wfile.write(body[:sent])

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", pages
    httpd.shutdown()


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "yolov5n.pt"
    checkpoint.save(path, Model("yolov5n.yaml", nc=2))
    return path.read_bytes()


def test_weights_by_name_are_fetched_once(server, official, tmp_path, monkeypatch):
    url, pages = server
    pages["/yolov5n.pt"] = 200, official, None, 0.2
    monkeypatch.setenv("YOLO_WEIGHTS_URL", url)
    model = checkpoint.load(tmp_path / "yolov5n.pt")
    del pages["/yolov5n.pt"]
    again = checkpoint.load(tmp_path / "yolov5n.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


BAD = {"missing": ((404, b"", None, 0.0), "Not Found"),
       "cut off": ((200, b"x" * 1000, 500, 0.0), "cut off|fetched"),
       "wrong content": ((200, b"<html>sign in</html>", None, 0.0), "something else"),
       "silent": ((200, b"x" * 9, None, 3.0), "timed out")}


@pytest.mark.parametrize("case", BAD)
def test_what_goes_wrong_is_one_line_with_the_address_and_leaves_nothing(server, tmp_path, monkeypatch, case):
    url, pages = server
    pages["/yolov5s.pt"], words = BAD[case]
    monkeypatch.setenv("YOLO_WEIGHTS_URL", url)
    monkeypatch.setattr(downloads, "TIMEOUT", 1)
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.read(tmp_path / "yolov5s.pt")
    message = str(caught.value)
    assert f"{url}/yolov5s.pt" in message and "models/yolov5s.yaml" in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_WEIGHTS_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="127.0.0.1:9/yolov5m.pt: can't be fetched .*refused"):
        checkpoint.read(tmp_path / "yolov5m.pt")


def data_yaml(folder, url):
    path = folder / "data.yaml"
    path.write_text(f"path: mine/set\ntrain: images\nval: images\nnames: [a]\ndownload: {url}\n")
    return path


def test_a_data_sets_archive_is_fetched_and_unpacked(server, tmp_path):
    url, pages = server
    pages["/set.zip"] = 200, zipped({"set/images/a.jpg": b"x", "set/labels/a.txt": b""}), None, 0.0
    config = read_data(data_yaml(tmp_path, f"{url}/set.zip"))
    assert [p.name for p in config.train[0].iterdir()] == ["a.jpg"] and not (tmp_path / "mine/set.zip").exists()


@pytest.mark.parametrize("name", ["../outside.txt", "/tmp/outside.txt", "set/../../outside.txt"])
def test_archives_that_want_out_are_refused_whole(server, tmp_path, name):
    url, pages = server
    pages["/bad.zip"] = 200, zipped({"set/images/a.jpg": b"x", name: b"x"}), None, 0.0
    with pytest.raises(UserError, match="outside"):
        read_data(data_yaml(tmp_path, f"{url}/bad.zip"))
    assert not list((tmp_path / "mine").iterdir()) and not (tmp_path / "outside.txt").exists()


def test_a_tar_with_a_link_out_is_refused(tmp_path):
    archive = tmp_path / "bad.tar"
    with tarfile.open(archive, "w") as file:
        link = tarfile.TarInfo("set/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    with pytest.raises(UserError, match="can't be unpacked"):
        downloads.unpack(archive, tmp_path / "into")


def test_a_command_under_download_is_never_run(tmp_path):
    with pytest.raises(UserError, match="is not run"):
        read_data(data_yaml(tmp_path, "touch /tmp/run"))
