"""Downloads against a local server: slow, cut off, missing, wrong, and archives that want out."""
from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import utils.downloads as downloads
import utils.files as files
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


asked: list[str] = []  # what the server was asked for


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Serves what `pages` holds: (status, body, bytes that are really sent, seconds of silence before them)."""
    pages: dict[str, tuple[int, bytes, int | None, float]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
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


# Several processes at once, or one that was killed --------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")


def at_once(function, *args, count=3):
    """Run function(*args) in several processes at the same time; their exit codes."""
    workers = [FORK.Process(target=function, args=args) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return [worker.exitcode for worker in workers]


def read_and_count(path):
    images = read_data(path).train[0]
    os._exit(0 if len(list(images.iterdir())) == 200 else 1)


def test_only_one_of_several_processes_fetches_and_unpacks_a_set(server, tmp_path):
    url, pages = server
    members = {f"set/images/{i}.jpg": b"x" * 1000 for i in range(200)}
    pages["/many.zip"] = 200, zipped({**members, "licence.txt": b"free"}), None, 0.5
    asked.clear()
    assert at_once(read_and_count, data_yaml(tmp_path, f"{url}/many.zip")) == [0, 0, 0]
    assert asked == ["/many.zip"]
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["licence.txt", "set"]


def load_and_leave(path):
    checkpoint.read(path)
    os._exit(0)


def test_only_one_of_several_processes_fetches_weights(server, official, tmp_path, monkeypatch):
    url, pages = server
    pages["/yolov5n.pt"] = 200, official, None, 0.5
    monkeypatch.setenv("YOLO_WEIGHTS_URL", url)
    asked.clear()
    assert at_once(load_and_leave, tmp_path / "yolov5n.pt") == [0, 0, 0]
    assert asked == ["/yolov5n.pt"] and [p.name for p in tmp_path.iterdir()] == ["yolov5n.pt"]


def unpack_half_and_die(path):
    def half(archive, folder):
        (folder / "set/images").mkdir(parents=True)
        (folder / "set/images/0.jpg").write_bytes(b"x")
        os.kill(os.getpid(), signal.SIGKILL)

    downloads.unpack = half
    read_data(path)


def test_a_half_unpacked_set_is_not_taken_for_whole(server, tmp_path):
    url, pages = server
    pages["/set.zip"] = 200, zipped({f"set/images/{i}.jpg": b"x" for i in range(200)}), None, 0.0
    path = data_yaml(tmp_path, f"{url}/set.zip")
    assert at_once(unpack_half_and_die, path, count=1) == [-signal.SIGKILL]
    assert not (tmp_path / "mine/set").exists()
    assert len(list(read_data(path).train[0].iterdir())) == 200  # its lock died with it, too


def test_an_archive_without_the_sets_folder_is_the_set(server, tmp_path):
    url, pages = server
    pages["/flat.zip"] = 200, zipped({"images/a.jpg": b"x", "labels/a.txt": b""}), None, 0.0
    config = read_data(data_yaml(tmp_path, f"{url}/flat.zip"))
    assert config.train == (tmp_path / "mine/set/images",) and (tmp_path / "mine/set/images/a.jpg").is_file()


def test_a_users_archive_and_files_beside_the_set_stay(server, tmp_path):
    url, pages = server
    pages["/set.zip"] = 200, zipped({"set/images/a.jpg": b"x", "licence.txt": b"theirs"}), None, 0.0
    (tmp_path / "mine").mkdir()
    for name in ("set.zip", "licence.txt"):
        (tmp_path / "mine" / name).write_text("mine")
    read_data(data_yaml(tmp_path, f"{url}/set.zip"))
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"set.zip", "licence.txt", "set"}
    assert (tmp_path / "mine/set.zip").read_text() == (tmp_path / "mine/licence.txt").read_text() == "mine"


def count_up(counter):
    for _ in range(50):
        with files.exclusive(counter):
            n = int(counter.read_text())
            time.sleep(0.0005)
            counter.write_text(str(n + 1))


def test_a_lock_excludes_and_leaves_nothing(tmp_path):
    counter = tmp_path / "n"
    counter.write_text("0")
    assert at_once(count_up, counter, count=4) == [0] * 4
    assert counter.read_text() == "200" and list(tmp_path.iterdir()) == [counter]


def test_where_no_lock_can_be_made_nobody_waits(tmp_path):
    (tmp_path / "file").write_text("")
    with files.exclusive(tmp_path / "file" / "below"):
        pass
