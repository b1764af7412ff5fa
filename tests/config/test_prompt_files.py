"""Prompt files as people have them: read as they are meant, or refused in a line that says what they are."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffinstruct.config.prompts import read_prompt_set, read_prompts
from diffinstruct.errors import UserError

PETS = ["a cat", "a dog"]
ROWS = [{"prompt": text} for text in PETS]
CUT = gzip.compress(b"a cat\n" * 99, mtime=0)[:-9].decode("latin-1")
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head>\n</html>\n"
READ: dict[str, tuple[str, str | bytes]] = {  # file -> (column, content), all of them the two pets
    "powershell_5.txt": ("prompt", "a cat\r\na dog\r\n".encode("utf-16-le")),
    "big_endian.txt": ("prompt", "a cat\r\na dog\r\n".encode("utf-16-be")),
    "utf32.txt": ("prompt", "a cat\r\na dog\r\n".encode("utf-32")),
    "old_mac.csv": ("prompt", "prompt,x\ra cat,1\ra dog,2\r"),
    "packed.txt.gz": ("prompt", gzip.compress(b"a cat\na dog\n", mtime=0)),
    "packed.CSV.GZ": ("prompt", gzip.compress(b"prompt\na cat\na dog\n", mtime=0)),
    "packed.jsonl.gz": ("prompt", gzip.compress(LINES.encode(), mtime=0)),
    "packed_all_the_same.csv": ("prompt", gzip.compress(b"prompt\na cat\na dog\n", mtime=0)),
    "lines.ndjson": ("prompt", LINES),
    "lines.json": ("prompt", LINES),
    "strings.jsonl": ("prompt", '"a cat"\n"a dog"\n'),
    "a_list.jsonl": ("prompt", json.dumps(ROWS, indent=1)),
    "nulls.json": ("prompt", json.dumps(["a cat", None, "a dog"])),
    "data.json": ("prompt", json.dumps({"version": 1, "data": ROWS})),
    "styles.json": ("prompt", json.dumps({"anime": ROWS[:1], "photo": ROWS[1:]})),
    "by_number.json": ("prompt", json.dumps(dict(enumerate(ROWS)))),
    "by_picture.json": ("prompt", json.dumps({"1.png": "a cat", "2.png": "a dog"})),
    "coco.json": (
        "caption",
        json.dumps({"info": {"year": 2014}, "images": [{"id": 1}], "annotations": [{"caption": text} for text in PETS]}),
    ),
    "pandas.json": ("prompt", json.dumps({"prompt": {"0": "a cat", "1": "a dog"}, "n": {"0": 1, "1": 2}})),
    "sep.csv": ("prompt", "sep=;\r\nprompt;x\r\na cat;1\r\na dog;2\r\n"),
    "dos.txt": ("prompt", b"a cat\r\na dog\r\n\x1a"),
    "no_width.txt": ("prompt", "\u00a0\na cat\n\u200b\na dog\n\ufeff\n"),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_as_it_is_meant(tmp_path, name):
    column, content = READ[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_prompts(tmp_path / name, column=column)["prompt"].tolist() == PETS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("twice.jsonl", '{"prompt": "a cat", "prompt": "a dog"}\n', "line 1: key 'prompt' is there twice in one object"),
        ("twice.json", '[{"prompt": "a cat", "prompt": "a dog"}]', "key 'prompt' is there twice in one object"),
        *((name, POINTER, "is a pointer of Git LFS and not the file itself; `git lfs pull` brings that")
          for name in ("pointer.txt", "pointer.csv", "pointer.parquet")),
        *((name, PAGE, "is a web page, as a link to one gives it, and not the file itself")
          for name in ("page.txt", "page.csv")),
        ("half.jsonl", r'{"prompt": "a \ud83d cat"}',
         r"holds '\ud83d', half of a character outside of UTF-16's first plane; save it with whole characters"),
        ("empty.jsonl", "", "no prompts in it"),
        ("empty.json", " \n", "no prompts in it"),
        ("not.json", '["a cat",]', "not JSON: Expecting value: line 1 column 10 (char 9)"),
        ("cut.txt.gz", CUT, "Compressed file ended before the end-of-stream"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_prompts_is_refused_by_what_it_is(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: {said}") and "\n" not in str(caught.value)


def test_quotes_in_a_tab_separated_table(tmp_path):
    """PartiPrompts has them as they are; pandas writes a field with quotes in quotes, its own doubled."""
    texts = ['a "red" cat', 'a 12" pizza', '"hello"', "plain"]
    (tmp_path / "a.tsv").write_text('prompt\tn\n"a ""red"" cat"\t1\n"a 12"" pizza"\t2\n"""hello"""\t3\nplain\t4\n')
    assert read_prompts(tmp_path / "a.tsv")["prompt"].tolist() == texts
    (tmp_path / "a.tsv").write_text("prompt\tn\n" + "".join(f"{text}\t1\n" for text in texts))
    assert read_prompts(tmp_path / "a.tsv")["prompt"].tolist() == texts


def test_a_field_inside_a_column_of_parquet_and_of_a_dataset(tmp_path):
    (tmp_path / "hub").mkdir()
    table = pa.table({"json": [{"prompt": text, "id": 1} for text in PETS], "n": [1, 2]})
    for path in (tmp_path / "a.parquet", tmp_path / "hub" / "train-00000-of-00001.parquet"):
        pq.write_table(table, path)
    for source in (tmp_path / "a.parquet", f"datasets:{tmp_path}/hub:train"):
        assert read_prompts(source, column="json.prompt")["prompt"].tolist() == PETS


def test_a_dataset_that_was_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"prompt": PETS}).save_to_disk(tmp_path / "saved")
    assert read_prompts(f"datasets:{tmp_path}/saved:train")["prompt"].tolist() == PETS
    with pytest.raises(UserError, match=r"saved: no .txt files in it; 'datasets:.*saved:<split>' reads a folder of tables$"):
        read_prompts(tmp_path / "saved")


def test_captions_of_a_folder_are_in_the_order_of_their_numbers_without_hidden_files(tmp_path):
    for name, text in (("1", "a cat"), ("2", "a dog"), ("10", "a fox")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "._1.txt").write_bytes(b"\x00\x05\x16\x07Mac OS X\xa3")
    assert read_prompts(tmp_path)["prompt"].tolist() == ["a cat", "a dog", "a fox"]
    (tmp_path / "11.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"/11.txt: is not UTF-8 text \(byte 3\); "):
        read_prompts(tmp_path)


def test_prompts_of_several_lines_are_counted(tmp_path):
    """A quote that is never closed swallows the rows after it, and nobody can tell that from a prompt of several lines."""
    (tmp_path / "a.csv").write_text('prompt,x\n"a 12 pizza,1\na dog,2\na bird", 3\n')
    assert str(read_prompt_set(tmp_path / "a.csv")).endswith("a.csv, 1 of several lines")
