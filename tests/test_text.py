"""Text files in every encoding that people have."""
from __future__ import annotations

import pytest

from utils.errors import UserError
from utils.text import decoded, read_text

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
