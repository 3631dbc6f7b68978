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
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import utils.downloads as downloads
import utils.files as files
from models import checkpoint
from models.yolo import Model
from training.settings import resolve
from utils.data.config import read_data
from utils.data.image_files import IMAGE_SUFFIXES
from utils.errors import UserError
from utils.options import training_parser


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


@pytest.mark.slow
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


EVIL = {"set/images/a.jpg": b"x", "set/cv2.py": b"1/0", "cv2.py": b"1/0", "yaml/__init__.py": b"1/0", "train.so": b"",
        "set/evil.pth": b"import os", "authorized_keys": b"", ".bashrc": b"", "__MACOSX/set/._a.jpg": b"", "b.txt": b""}


@pytest.mark.parametrize("where", ["mine/set", "set", "~/set", "{root}/set", "deep/er/set"])
def test_nothing_of_an_archive_gets_out_of_the_sets_folder_and_no_code_into_it(server, tmp_path, monkeypatch, capsys,
                                                                               where):
    url, pages = server
    pages["/evil.zip"] = 200, zipped(EVIL), None, 0.0
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = data_yaml(tmp_path, f"{url}/evil.zip")
    path.write_text(path.read_text().replace("mine/set", where.format(root=tmp_path)))
    folder = read_data(path).train[0].parent
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} - {"data.yaml"}
    inside = folder.relative_to(tmp_path).as_posix()
    assert files == {f"{inside}/images/a.jpg", f"{inside}/b.txt"}
    assert "6 files are left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", [".ssh", "~/.config/x", "a/.git/hooks"])
def test_no_archive_is_unpacked_into_a_hidden_folder(server, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = data_yaml(tmp_path, f"{server[0]}/set.zip")
    path.write_text(path.read_text().replace("mine/set", name))
    with pytest.raises(UserError, match="is hidden"):
        read_data(path)
    assert list(tmp_path.iterdir()) == [path]


def test_no_archive_is_unpacked_where_python_imports_from(server, tmp_path, monkeypatch):
    for entry in ("lib/python", "zipped.zip"):
        monkeypatch.syspath_prepend(str(tmp_path / entry))
    repository = tmp_path / "repository"
    (repository / "models").mkdir(parents=True)
    (repository / "models/__init__.py").touch()
    monkeypatch.setattr(downloads, "ROOT", repository)
    for folder in (repository, tmp_path, "/", tmp_path / "lib", tmp_path / "lib/python", tmp_path / "zipped.zip",
                   repository / "models/set", repository / "models/deep/set", tmp_path / "site-packages/cv2",
                   repository / "models/../models/x"):
        with pytest.raises(UserError, match="Python imports from it"):
            downloads.fetch_folder(f"{server[0]}/set.zip", Path(folder), "mend")
    assert not (tmp_path / "lib").exists()


@pytest.mark.parametrize("name", [".", "..", "/", "~", "full"])
def test_a_folder_that_is_there_is_left_as_it_is(server, tmp_path, monkeypatch, name):
    url, pages = server
    pages["/evil.zip"] = 200, zipped(EVIL), None, 0.0
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("home", "yamls/full"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "mine.txt").touch()
    path = data_yaml(tmp_path / "yamls", f"{url}/evil.zip")
    path.write_text(path.read_text().replace("mine/set", name))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="images does not exist"):
        read_data(path)
    assert sorted(tmp_path.rglob("*")) == before


def tar_with(path, *members):
    """A tar of (name, type, link or content)."""
    with tarfile.open(path, "w") as file:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content
                file.addfile(info)
    return path


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["/etc", "../../out", "set/../../../out"])
def test_links_out_of_an_archive_are_refused_whole(tmp_path, kind, target):
    archive = tar_with(tmp_path / "a.tar", ("set/a.jpg", tarfile.REGTYPE, b"x"), ("set/l", kind, target),
                       ("set/l/b.txt", tarfile.REGTYPE, b"x"))
    with pytest.raises(UserError, match="can't be unpacked"):
        downloads.unpack(archive, tmp_path / "into")
    assert list(tmp_path.iterdir()) == [archive]


def test_links_inside_an_archive_become_copies(tmp_path):
    archive = tar_with(tmp_path / "a.tar", ("a.jpg", tarfile.REGTYPE, b"x"), ("b.jpg", tarfile.SYMTYPE, "a.jpg"),
                       ("c.jpg", tarfile.LNKTYPE, "a.jpg"), ("d.jpg", tarfile.SYMTYPE, "none.jpg"))
    assert downloads.unpack(archive, tmp_path / "into") == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "into").iterdir() if not p.is_symlink()} == dict.fromkeys(
        ("a.jpg", "b.jpg", "c.jpg"), b"x")
    circle = tar_with(tmp_path / "b.tar", ("a.jpg", tarfile.SYMTYPE, "b.jpg"), ("b.jpg", tarfile.SYMTYPE, "a.jpg"))
    with pytest.raises(UserError, match="can't be unpacked"):
        downloads.unpack(circle, tmp_path / "circle")


def test_windows_paths_of_an_archive_are_folders(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({"images\\a.jpg": b"x"}))
    downloads.unpack(tmp_path / "a.zip", tmp_path / "into")
    assert (tmp_path / "into/images/a.jpg").is_file()
    for name in ("..\\a.jpg", "C:\\a.jpg", "C:a.jpg"):
        (tmp_path / "b.zip").write_bytes(zipped({name: b"x"}))
        with pytest.raises(UserError, match="outside"):
            downloads.unpack(tmp_path / "b.zip", tmp_path / "none")


@pytest.mark.parametrize("address", ["http://[::1/a.zip", "http:///a.zip", "http://x\x00y/a.zip", "http://ä/ü.zip",
                                     f"http://127.0.0.1:9/{'a' * 300}.zip"])
def test_an_address_that_is_none_is_one_line(tmp_path, address):
    with pytest.raises(UserError, match="can't be fetched"):
        downloads.fetch_folder(address, tmp_path / "set", "mend")
    assert not list(tmp_path.iterdir())


def test_an_archive_may_bring_every_kind_of_image():
    assert IMAGE_SUFFIXES < downloads.ENDINGS


def test_a_data_yaml_decides_no_folder_to_fetch_weights_into(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tiny.read_text().replace("path: .", f"path: {tiny.parent}")
    (tmp_path / "my.yaml").write_text(f"{text}defaults: {{weights: new/yolov5n.pt}}\n")
    with pytest.raises(UserError, match="defaults: weights: there is no new/yolov5n.pt"):
        resolve(training_parser("").parse_args(["--data", "my.yaml"]))
    assert [p.name for p in tmp_path.iterdir()] == ["my.yaml"]


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


@pytest.mark.slow
def test_only_one_of_several_processes_fetches_and_unpacks_a_set(server, tmp_path):
    url, pages = server
    members = {f"set/images/{i}.jpg": b"x" * 1000 for i in range(200)}
    pages["/many.zip"] = 200, zipped({**members, "licence.txt": b"free"}), None, 0.5
    asked.clear()
    assert at_once(read_and_count, data_yaml(tmp_path, f"{url}/many.zip")) == [0, 0, 0]
    assert asked == ["/many.zip"]
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["set"] and (tmp_path / "mine/set/licence.txt").is_file()


def load_and_leave(path):
    checkpoint.read(path)
    os._exit(0)


@pytest.mark.slow
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


@pytest.mark.parametrize("kind", ["cut off", "sparse"])
def test_a_damaged_archive_is_one_line(server, tmp_path, kind):
    url, pages = server
    info = tarfile.TarInfo("set/images/a.jpg")
    if kind == "sparse":  # its map of holes is missing
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    with tarfile.open(tmp_path / "set.tgz", "w:gz") as tar:
        tar.addfile(info)
    body = (tmp_path / "set.tgz").read_bytes()
    (tmp_path / "set.tgz").unlink()
    pages["/set.tgz"] = 200, body[:len(body) // 2] if kind == "cut off" else body, None, 0.0
    with pytest.raises(UserError, match="answered with something else"):
        read_data(data_yaml(tmp_path, f"{url}/set.tgz"))
    assert not (tmp_path / "mine/set").exists()


def test_an_archive_larger_than_the_disk_is_refused_before_it_fills_it(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    (tmp_path / "a.zip").write_bytes(zipped({"a.jpg": bytes(600), "b.jpg": bytes(600)}))
    tar_with(tmp_path / "a.tar", ("a.jpg", tarfile.REGTYPE, bytes(1200)))
    for name in ("a.zip", "a.tar"):
        with pytest.raises(UserError, match="GB are free"):
            downloads.unpack(tmp_path / name, tmp_path / "into")
    assert not (tmp_path / "into").exists()


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


@pytest.mark.slow
def test_a_lock_excludes_and_leaves_nothing(tmp_path):
    counter = tmp_path / "n"
    counter.write_text("0")
    assert at_once(count_up, counter, count=4) == [0] * 4
    assert counter.read_text() == "200" and list(tmp_path.iterdir()) == [counter]


@pytest.mark.slow
def test_where_no_lock_can_be_made_nobody_waits(tmp_path):
    (tmp_path / "file").write_text("")
    with files.exclusive(tmp_path / "file" / "below"):
        pass
