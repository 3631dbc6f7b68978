"""Text files in every encoding that people have, yamls of every kind, and how text is printed and written again."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from training.loggers import RunLogger
from utils.errors import UserError, run_cli
from utils.files import write_json, write_yaml
from utils.tables import read_results, write_csv
from utils.text import LARGEST_YAML, decoded, read_json, read_lines, read_text, read_yaml_mapping

ROOT = Path(__file__).resolve().parents[1]

TEXT = "names: [鱼, café]\r\npath: ä\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_tell_themselves_are_read(encoding, tmp_path):
    file = tmp_path / "data.yaml"
    file.write_bytes(TEXT.encode(encoding))
    assert read_text(file) == TEXT.replace("\r\n", "\n")


def test_utf16_without_a_mark_is_seen_by_its_zeros(tmp_path):
    assert decoded("0 .5 .5 .2 .3\n".encode("utf-16-be"), "a.txt") == "0 .5 .5 .2 .3\n"


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "cp1252"])
def test_other_encodings_are_refused_with_the_place(encoding, tmp_path):
    file = tmp_path / "data.yaml"
    file.write_bytes("path: .\nnames: [é]\n".encode(encoding, "ignore") if encoding != "gbk"
                     else "path: .\nnames: [鱼]\n".encode(encoding))
    with pytest.raises(UserError, match=r"data.yaml: line 2 is not UTF-8 \(byte 0x..\); save the file as UTF-8"):
        read_text(file)


def test_missing_files_and_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match="--data .*no.yaml: no such file"):
        read_text(tmp_path / "no.yaml", "--data")
    with pytest.raises(UserError, match="can't be read"):
        read_text(tmp_path)


@pytest.mark.parametrize("data, words", [
    (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1", "is not a text file"), (b"a\0b\0\0c", "is not a text file"),
    (b"\xff\xfe\0", "not UTF-16-LE"), (b"0 .5 .5 .2 .2\n" * 9 + b"\0", "is not a text file"),
    (b"path: a\0b\ntrain: images\nval: images\n", "is not a text file"),
    ("a".encode("utf-32-le"), "is not a text file")])
def test_what_is_no_text_is_refused(data, words):
    with pytest.raises(UserError, match=f"a.jpg: .*{words}"):
        decoded(data, "a.jpg")


@pytest.mark.parametrize("declared", ["klingon", "zip", "punycode", "\0"])
def test_an_encoding_that_is_none_is_refused_at_once(declared):
    with pytest.raises(UserError, match="no encoding"):
        decoded(b"zz9" * 100_000, "a.xml", declared)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "data.yaml")
    for read in (read_text, read_json, read_lines):
        with pytest.raises(UserError, match="not a file"):
            read(tmp_path / "data.yaml")
    with pytest.raises(UserError, match="not a file"):
        read_yaml_mapping(tmp_path / "data.yaml", "--data")


def test_lists_keep_names_with_rare_spaces(tmp_path):
    """str.splitlines() would cut them."""
    (tmp_path / "a.txt").write_bytes(" a\u2028b.jpg\r\n\n c.jpg ".encode("utf-16"))
    assert read_lines(tmp_path / "a.txt") == ["a\u2028b.jpg", "c.jpg"]


# ---------------------------------------------------------------------------------------------------------------- yaml

def bomb(line: str) -> str:
    """Ten lines, each of nine aliases of the one before."""
    letters = "abcdefghij"
    return "a: &a {k: [1, 2]}\n" + "".join(
        f"{new}: &{new} {line.format(', '.join([f'*{old}'] * 9))}\n" for old, new in zip(letters, letters[1:]))


@pytest.mark.parametrize("text, words", [
    ("lr0: 2024-13-45", "line 1: '2024-13-45' is no timestamp"), ("lr0: 1\nx: " + "1" * 5000, "line 2: '11.*is no int"),
    ("lr0: 0x" + "f" * 5000, "is no int"), ("lr0: " + ":".join(["1", *["59"] * 3000]) + ".5", "is no float"),
    ("lr0: !!int abc", "'abc' is no int"), ("lr0: !!int ''", "'' is no int"), ("lr0: !!bool maybe", "is no bool"),
    ("lr0: !!timestamp x", "is no timestamp"), ("lr0: !!float x", "is no float"), ("lr0: !!binary 'é'", "yaml"),
    ("lr0: " + "[" * 3000, "nested too deep"), ("{lr0: " * 3000, "nested too deep"), ("- " * 3000, "nested too deep"),
    ('lr0: "a\\0b"', "is no str"), ('lr0: "\\uD800"', "is no str"), ("lr0: 1\nlr0: 2", "line 2: 'lr0' is given twice"),
    ("names:\n  0: a\n  '0': b", "line 3: '0' is given twice"), ("{[a]: 1}", "unhashable"), ("a: b: c", "line 1: "),
    ("lr0: &a [*a]", "an alias stands in what it is for"), ("&a {x: *a}", "an alias stands in what it is for"),
    (bomb("[{}]"), "more than 50,000 values"), (bomb("{{<<: [{}]}}"), "more than 50,000 values"),
    pytest.param("a: [" + "1," * 200_000 + "1]", "more than 50,000 values", marks=pytest.mark.slow),
    ("a: " + "b" * LARGEST_YAML, "1,048,576 bytes"),
    ("!!python/object/apply:os.system [ls]", "could not determine a constructor"), ("a: 1\n---\nb: 2", "document"),
    ("- a", "must be a mapping"), ("", "must be a mapping"), ("a: \x07", "yaml")])
def test_bad_yamls_are_one_line(tmp_path, text, words):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        read_yaml_mapping(tmp_path / "a.yaml", "--hyp")
    assert str(error.value).startswith(f"{tmp_path / 'a.yaml'}: ") and "\n" not in str(error.value)


def test_aliases_and_merges_within_reason_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n")
    found = read_yaml_mapping(tmp_path / "a.yaml", "--hyp")
    assert found["b"] == {"x": 1, "y": 3} and found["c"] == [{"x": 1, "y": 2}] * 2


def test_texts_are_read_as_they_are_written(tmp_path):
    words = ["on", "no", "010", "0x10", "12:30", "null", "2024-01-01", "1e3", ".inf", "=", "<<", "1_000"]
    (tmp_path / "a.yaml").write_text(f"names: [{', '.join(words)}]\npath: 2024\ntest: null\nnc: 010\n")
    found = read_yaml_mapping(tmp_path / "a.yaml", "--data", texts=("names", "path", "test"))
    assert found == {"names": words, "path": "2024", "test": None, "nc": 8}


# --------------------------------------------------------------------------------------------------------- results.csv

TABLE = "epoch,train/box,metrics/mAP\n0,0.5,\n1,1.25e-05,0.125\n"


@pytest.mark.parametrize("text, encoding", [
    (TABLE, "utf-8"), (TABLE, "utf-8-sig"), (TABLE.replace(",", ";").replace(".", ","), "utf-8-sig"),
    (TABLE.replace(",", "\t"), "utf-16"), (TABLE.replace("\n", "\r\n").replace("1,1", '"1","1').replace("05,", '05",'),
                                          "cp1252"), (TABLE.replace("0.5,\n", "0.5\n"), "utf-8"),
    ("epoch,train/box,metrics/mAP\n1,1.25e-05,0.125\n\n0,9,9\n0,0.5,\n , ,\n", "utf-8"),
    ('"epoch","train/box\n","metrics/mAP"\n0,"0.5\n",\n1,1.25e-05,"\n0.125"\n', "utf-8")])
def test_results_are_read_as_spreadsheets_save_them(tmp_path, text, encoding):
    """A byte order mark or semicolons used to end --resume in a KeyError."""
    (tmp_path / "results.csv").write_bytes(text.encode(encoding))
    assert read_results(tmp_path / "results.csv") == [
        {"epoch": 0, "train/box": "0.5", "metrics/mAP": ""},
        {"epoch": 1, "train/box": "1.25e-05", "metrics/mAP": "0.125"}]


@pytest.mark.parametrize("text, found", [
    ("\ufeff" + TABLE.replace(",", ";").replace(".", ","), "epoch,train/box,metrics/mAP\n0,0.5,\n1,0.25,\n"),
    ("train/box,epoch\n7,0\n0.5,0\n8,1\n", "train/box,epoch\n0.5,0\n0.25,1\n"),
    ('epoch,"a, b",train/box\n0,3,4\n', 'epoch,"a, b",train/box\n0,3,4\n1,,0.25\n')])
def test_a_run_goes_on_with_results_that_others_have_saved(tmp_path, text, found):
    (tmp_path / "results.csv").write_text(text, encoding="utf-8")
    log = RunLogger(tmp_path, start_epoch=1)
    log.epoch(1, {"train/box": 0.25})
    log.close()
    assert (tmp_path / "results.csv").read_text() == found


def test_tensorboard_needs_a_name_in_utf8(tmp_path):
    (folder := tmp_path / os.fsdecode(b"a\xff")).mkdir()
    with pytest.raises(UserError, match="not UTF-8"):
        RunLogger(folder)


@pytest.mark.parametrize("text, words", [
    ("a,b\n1,2\n", "line 2 is no row"), ("epoch,b\n,2\n", "line 2"), ("epoch,b\n0,1\n1,x\n", "line 3"),
    ("epoch,b\n0,1,2\n", "line 2"), ("epoch\ninf\n", "line 2"), ("epoch\n" + "1" * 5000, "line 2"),
    ("epoch,b\n0,é\n", "line 2"), ("epoch,b,b\n0,1,2\n", "a title is there twice"), ("epoch,b\n0,1,\n", "line 2"),
    ('epoch,b\n0,"1\n\n2"\n', "line 4"), ('epoch,b\n0,"' + "1" * 200_000, "line 2")])
def test_results_that_are_none_are_one_line(tmp_path, text, words):
    (tmp_path / "results.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_results(tmp_path / "results.csv")


def test_no_results_are_no_rows(tmp_path):
    for text in ("", "epoch,a\n"):
        (tmp_path / "results.csv").write_text(text)
        assert read_results(tmp_path / "results.csv") == []


# ----------------------------------------------------------------------------------------------------- printed, written

ODD = "鱼 é \udcff"  # the last is a byte of a file name that is no UTF-8


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("end, code", [("print(text)", 0), ("raise UserError(text + '\\n' + text)", 2),
                                       ("print(*tqdm([0], text))", 0)])
def test_every_letter_can_be_printed(encoding, end, code):
    """Output that went into a file used to end at the table, on a system that is not UTF-8."""
    program = (f"from tqdm import tqdm\nfrom utils.errors import UserError, run_cli\n"
               f"def main():\n    text = {ODD!r}\n    {end}\nrun_cli(main)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60,
                          env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == code and b"Traceback" not in done.stderr
    assert "鱼".encode(encoding, "backslashreplace") in done.stdout + done.stderr
    assert code == 0 or done.stderr.count(b"\n") == 1


def test_letters_that_the_system_lacks_in_names_of_files(tmp_path):
    """A class becomes _ in the name of its folder; a path that was given is one line."""
    program = ("from pathlib import Path\nfrom utils.errors import run_cli\nfrom utils.files import safe_name\n"
               "print(safe_name('a\\u9c7c'))\nrun_cli(lambda: Path('\\u9c7c.txt').read_text())")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60,
                          env={**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 2 and done.stdout.strip() == b"a_" and done.stderr.count(b"\n") == 1
    assert b"error: \\u9c7c.txt: has letters that this system's encoding lacks" in done.stderr


def test_opencvs_want_of_memory_is_one_line(capsys):
    def main() -> None:
        raise cv2.error("OpenCV(5.0.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 8 bytes")

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory (OpenCV")


def test_names_that_are_not_utf8_are_written_and_read_again(tmp_path):
    write_json(tmp_path / "a.json", {"file": ODD})
    write_yaml(tmp_path / "a.yaml", {"file": ODD})
    write_csv(tmp_path / "a.csv", [{"file": ODD}])
    assert json.loads((tmp_path / "a.json").read_bytes()) == read_json(tmp_path / "a.json") == {"file": ODD}
    assert read_yaml_mapping(tmp_path / "a.yaml", "") == {"file": ODD}
    assert read_lines(tmp_path / "a.csv") == ["file", "鱼 é \\udcff"]
