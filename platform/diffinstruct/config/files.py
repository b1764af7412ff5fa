"""Files as people have them: text in the encodings that programs write, and files that are not what their name says."""

from __future__ import annotations

import codecs
import gzip
import re
from pathlib import Path

from diffinstruct.errors import UserError

POINTER = b"version https://git-lfs"
PAGES = (b"<!doctype html", b"<html")
MARKS = (  # byte order marks; UTF-32's begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def refuse_stand_in(path: Path) -> None:
    """Refuse what lies in a file's place: a pointer of Git LFS, or the page that a link shows. Raises UserError."""
    with path.open("rb") as file:
        head = file.read(len(POINTER)).lstrip()
    if head == POINTER:
        raise UserError(f"{path}: is a pointer of Git LFS and not the file itself; `git lfs pull` brings that")
    if head.lower().startswith(PAGES):
        raise UserError(f"{path}: is a web page, as a link to one gives it, and not the file itself")


def file_text(path: Path) -> str:
    """A file's text, packed by gzip or not, with the ends of lines of this system.

    It is UTF-8. Windows writes a byte order mark, and some of its programs UTF-16, one that has a mark or begins with an
    ASCII character. Raises UnicodeDecodeError.
    """
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    encoding = next((encoding for mark, encoding in MARKS if content.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and len(content) > 3 and len(content) % 2 == 0:
        zeros = [byte == 0 for byte in content[:4]]
        if zeros in ([False, True] * 2, [True, False] * 2):
            encoding = "utf-16-le" if zeros[1] else "utf-16-be"
    return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def natural_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key that sorts names with their numbers by value: 2.png comes before 10.png."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (0, part.lower()) for part in parts], name
