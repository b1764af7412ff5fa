"""`diffinstruct rewards`: what there is, whether it can be trusted, and what it says of a folder of pictures."""

import json
import re
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_reward_validation import honest, wrong_sign
from tiny.commands import complaint, imported

from diffinstruct.cli.main import main
from diffinstruct.errors import UserError
from diffinstruct.reward_service.client import load_reward
from diffinstruct.reward_service.score_folder import pictures_with_prompts, read_picture
from reward_models import NAMES

RED = "tiny.rewards:Red"
CALM = "tiny.rewards:Calm"


class Honest(torch.nn.Module):
    def forward(self, images, prompts):
        return honest(images, prompts)


class WrongSign(torch.nn.Module):
    def forward(self, images, prompts):
        return wrong_sign(images, prompts)


def paint(path: Path, red: int, size: tuple[int, int] = (8, 6)) -> None:
    """A lossless picture, as red as it is told."""
    Image.new("RGB", size, (red, 0, 0)).save(path, lossless=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five pictures of two sizes and two formats, redder from name to name; and what is no picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate(["a1.png", "a2.webp", "A9.png", "a10.png", "b.png"]):
        paint(folder / name, 40 * (i + 1), (8, 6) if i % 2 else (10, 10))
    (folder / "notes.md").write_text("not a picture")
    (folder / ".hidden.png").write_text("not one either")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    return tmp_path / "prompts.txt"


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys, *arguments: object) -> str:
    """What is said on stderr by a command that ends 1."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.removesuffix("\n")


# -------------------------------------------------------------------------------------------------------- list
def test_list_says_what_is_known_of_each_reward(capsys):
    run("rewards", "list")
    out = capsys.readouterr().out
    for name, entry in NAMES.items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(entry.line)}$", out, re.MULTILINE)
        for known in (entry.range, entry.weights, entry.licences, entry.path, entry.paper.removeprefix("-")):
            assert known in out


def test_list_and_mistakes_answer_before_torch_starts(folder, prompts):
    for arguments, expected in (
        (["list"], 0),
        (["test", "pikscore"], 2),
        (["score", folder, prompts, "--reward", "pikscore"], 2),
    ):
        code, packages = imported("rewards", *arguments)
        assert code == expected
        assert packages.isdisjoint({"torch", "ray", "mlflow", "pandas", "transformers"})


# -------------------------------------------------------------------------------------------------------- score
def test_score_writes_a_row_a_picture_and_a_column_a_reward(folder, prompts, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    run("rewards", "score", folder, prompts, "--reward", RED, "--reward", CALM, "-o", out)
    table = pd.read_csv(out)
    assert list(table) == ["image", "prompt", RED, CALM]
    assert list(table["image"]) == ["a1.png", "a2.webp", "A9.png", "a10.png", "b.png"]  # numbers by value
    assert list(table["prompt"]) == ["one", "two", "three", "four", "five"]
    reds = np.array([40, 80, 120, 160, 200]) / 255
    np.testing.assert_allclose(table[RED], reds**2, rtol=1e-5)
    said = capsys.readouterr().out.splitlines()
    mean, low, high = map(float, re.fullmatch(rf"{RED}  +(\S+) \[(\S+), (\S+)\]  of 5 pictures", said[1]).groups())
    assert low < mean < high and mean == pytest.approx((reds**2).mean(), abs=0.01)
    assert said[2].startswith(CALM) and said[3] == str(out)
    assert [path.name for path in tmp_path.iterdir()].count("scores.csv") == len(list(tmp_path.glob("*scores*"))) == 1


def test_a_table_that_names_pictures_pairs_them_itself(folder, tmp_path, capsys):
    """Its other columns stay, and its own scores of before are replaced."""
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(f'prompt,image,model,{RED}\n"b, again",b.png,x,7\none,a1.png,y,7\nthe other,b.png,x,7\n')
    run("rewards", "score", folder, pairs, "--reward", RED, "-o", tmp_path / "scores.csv")
    table = pd.read_csv(tmp_path / "scores.csv")
    assert list(table) == ["image", "prompt", "model", RED]
    assert list(table["image"]) == ["b.png", "a1.png", "b.png"] and list(table["prompt"]) == ["b, again", "one", "the other"]
    np.testing.assert_allclose(table[RED], [(200 / 255) ** 2, (40 / 255) ** 2, (200 / 255) ** 2], rtol=1e-5)
    assert f"3 of 5 pictures in {folder} are not named in {pairs} and are not scored" in capsys.readouterr().out


def test_more_pictures_than_a_batch_keep_their_order(tmp_path):
    for i in range(40):
        paint(tmp_path / f"{i}.png", 5 * i, (8, 8 + i % 2))
    (tmp_path / "p.txt").write_text("x\n" * 40)
    run("rewards", "score", tmp_path, tmp_path / "p.txt", "--reward", RED, "-o", tmp_path / "s.csv")
    np.testing.assert_allclose(pd.read_csv(tmp_path / "s.csv")[RED], (np.arange(40) * 5 / 255) ** 2, rtol=1e-5)


def test_a_real_reward_scores_as_it_does_by_itself(folder, prompts, tmp_path):
    run("rewards", "score", folder, prompts, "--reward", "pocket_preference", "-o", tmp_path / "s.csv")
    image = np.asarray(Image.open(folder / "a10.png"), np.float32) / 255
    expected = load_reward("pocket_preference")(torch.tensor(image).permute(2, 0, 1)[None], ["four"]).item()
    assert pd.read_csv(tmp_path / "s.csv")["pocket_preference"][3] == pytest.approx(expected, rel=1e-4)


def test_pictures_are_read_as_they_are_seen(tmp_path):
    """Turned by their camera's note, on white where transparent, grey in three channels."""
    lying = Image.new("RGB", (8, 4), (255, 0, 0))
    lying.paste((0, 0, 255), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    lying.save(tmp_path / "turned.png", exif=exif)
    turned = read_picture(tmp_path / "turned.png")
    assert turned.shape == (3, 8, 4)
    assert turned[2, :4].min() == turned[0, 4:].min() == 1 and turned[0, :4].max() == turned[2, 4:].max() == 0

    glass = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    glass.paste((0, 255, 0, 255), (0, 0, 4, 2))
    for mode, name in (("RGBA", "glass.png"), ("P", "palette.png")):
        glass.convert(mode).save(tmp_path / name)
        seen = read_picture(tmp_path / name)
        assert seen[:, 2:].min() == 1 and seen[0, :2].max() == 0 and seen[1, :2].min() == 1
    for mode, value in (("L", 51), ("LA", (51, 255)), ("1", 1)):
        Image.new(mode, (4, 4), value).save(tmp_path / "grey.png")
        grey = read_picture(tmp_path / "grey.png")
        assert grey.shape == (3, 4, 4) and grey.unique().tolist() == pytest.approx([0.2 if mode != "1" else 1])
    Image.new("I;16", (4, 4), 13_107).save(tmp_path / "grey.png")
    grey = read_picture(tmp_path / "grey.png")
    assert grey.shape == (3, 4, 4) and grey.dtype == torch.float32 and grey.unique().tolist() == pytest.approx([0.2])


def test_pictures_below_the_folder_are_pointed_at(tmp_path, capsys):
    """HPSv2's layout: a folder for each style, with its own list of prompts."""
    (tmp_path / "model" / "anime").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "model" / "anime" / "00000.jpg")
    (tmp_path / "anime.json").write_text('["a hat"]')
    said = complaint(capsys, "rewards", "score", tmp_path / "model", tmp_path / "anime.json", "--reward", RED)
    assert said.endswith(", .tif, .tiff), but in anime below it: score each with its own prompts")
    assert main(["rewards", "score", f"{tmp_path}/model/anime", f"{tmp_path}/anime.json", "--reward", RED]) == 0


def test_turned_pictures_are_batched_by_the_size_they_are_seen_in(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (8, 4), (200, 0, 0)).save(tmp_path / "1.png", exif=exif)
    paint(tmp_path / "2.png", 100, (4, 8))
    paint(tmp_path / "3.png", 50, (8, 4))
    (tmp_path / "p.txt").write_text("x\n" * 3)
    run("rewards", "score", tmp_path, tmp_path / "p.txt", "--reward", RED, "-o", tmp_path / "s.csv")
    np.testing.assert_allclose(pd.read_csv(tmp_path / "s.csv")[RED], (np.array([200, 100, 50]) / 255) ** 2, rtol=1e-5)


@pytest.mark.parametrize(("kind", "note"), [(2, b"6\0\0\0"), (3, b"\0\0\0\0"), (3, b"\x63\0\0\0")])  # 2: text, 3: a number
def test_a_camera_note_that_means_nothing_is_ignored(tmp_path, kind, note):
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x0112, kind, 2 if kind == 2 else 1) + note + bytes(4)
    Image.new("RGB", (8, 4), (200, 0, 0)).save(tmp_path / "1.jpg", exif=exif, quality=100)
    (tmp_path / "p.txt").write_text("x\n")
    run("rewards", "score", tmp_path, tmp_path / "p.txt", "--reward", RED, "-o", tmp_path / "s.csv")
    assert pd.read_csv(tmp_path / "s.csv")[RED][0] == pytest.approx((200 / 255) ** 2, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["{folder}", "{prompts}"],
            r"--reward: name at least one; there are aesthetic_v1, .*, and your own as module:callable",
        ),
        (
            ["{folder}", "{prompts}", "--reward", "pikscore"],
            r"--reward: no reward is named 'pikscore', did you mean 'pickscore'\?",
        ),
        (["{folder}", "{prompts}", "--reward", "x"], r"--reward: no reward is named 'x'; there are aesthetic_v1, .*"),
        (["{folder}", "{prompts}", "--reward", "tiny.rewards:Rad"], r"rewards: cannot load 'tiny.rewards:Rad': .*mean 'Red'\?"),
        (["{folder}", "{prompts}", "--reward", RED, "-o", "s.cvs"], r"-o: should be a .csv file, got 's.cvs'"),
        (["{folder}", "{prompts}", "--reward", RED, "-o", "/nowhere/s.csv"], r"-o: no folder '/nowhere'"),
        (["{folder}x", "{prompts}", "--reward", RED], r"\S*/picturesx: no such folder, did you mean '\S*/pictures'\?"),
        (
            ["{folder}", "{folder}/../promts.txt", "--reward", RED],
            r"\S*promts.txt: no such file, did you mean '\S*prompts.txt'\?",
        ),
        (["{empty}", "{prompts}", "--reward", RED], r"\S*/empty: no pictures in it \(.png, .jpg, .jpeg, .*\)"),
        (["{folder}", "{empty}/number.jsonl", "--reward", RED], r"\S*/number.jsonl: no picture 1 in \S*/pictures"),
        (["{folder}", "{empty}/long.jsonl", "--reward", RED], r"\S*/long.jsonl: no picture 'a{300}' in \S*/pictures"),
    ],
)
def test_score_says_in_a_line_what_is_wrong(folder, prompts, tmp_path, capsys, arguments, expected):
    (tmp_path / "empty").mkdir()
    for name, image in (("number", 1), ("long", "a" * 300)):
        (tmp_path / "empty" / f"{name}.jsonl").write_text(json.dumps({"prompt": "x", "image": image}) + "\n")
    places = {"folder": folder, "prompts": prompts, "empty": tmp_path / "empty"}
    said = complaint(capsys, "rewards", "score", *(a.format(**places) for a in arguments))
    assert re.fullmatch(expected, said)


def test_score_refuses_what_does_not_match_or_cannot_be_read(folder, prompts, tmp_path, capsys):
    asked = ["rewards", "score", folder, prompts, "--reward", RED, "-o", tmp_path / "s.csv"]
    prompts.write_text("one\n\ntwo\n")
    assert complaint(capsys, *asked) == (
        f"{folder}: 5 pictures, but 2 prompts in {prompts}; give one for each, in the order of names, "
        "or a .csv with columns 'image' and 'prompt'"
    )
    (tmp_path / "pairs.csv").write_text("image,prompt\na1.png,one\na3.webp,two\n")
    said = complaint(capsys, "rewards", "score", folder, tmp_path / "pairs.csv", "--reward", RED)
    assert said == f"{tmp_path}/pairs.csv: no picture 'a3.webp' in {folder}, did you mean 'a2.webp'?"

    prompts.write_text("one\ntwo\nthree\nfour\nfive\n")
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "b.png")
    whole = (folder / "b.png").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b"", b"text"):
        (folder / "b.png").write_bytes(damaged)
        said = complaint(capsys, *asked)
        assert re.fullmatch(rf"{folder}/b.png: cannot be read as a picture: .+", said) and "\n" not in said
    (folder / "b.png").unlink()
    Image.new("F", (4, 4), 0.5).save(folder / "b.tiff")
    (folder / "b.tiff").rename(folder / "b.png")  # Pillow looks at what a file is, not at its name
    assert "has floating-point pixels" in complaint(capsys, *asked)
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize("column", ["Image", " image", "file_name", "filename", "path", "picture"])
@pytest.mark.parametrize("cell", ["{}", " {}", "out/pictures/{}"])
def test_a_column_of_pictures_by_another_name_is_not_paired_by_order(folder, tmp_path, capsys, column, cell):
    pairs = tmp_path / "pairs.csv"
    names = ["b.png", "a10.png", "A9.png", "a2.webp", "a1.png"]
    pairs.write_text(f"prompt,{column}\n" + "".join(f"x,{cell.format(name)}\n" for name in names))
    said = complaint(capsys, "rewards", "score", folder, pairs, "--reward", RED, "-o", tmp_path / "s.csv")
    assert said == f"{pairs}: column {column!r} names pictures of {folder}; call it 'image', each name as in the folder"
    pairs.write_text("prompt,model,mouth\n" + "x,y,\n" * 5)  # any other column is none of our business
    run("rewards", "score", folder, pairs, "--reward", RED)
    pairs.with_suffix(".jsonl").write_text('{"prompt": "x", "n": 1}\n' * 5)  # whatever it holds
    run("rewards", "score", folder, pairs.with_suffix(".jsonl"), "--reward", RED)


def test_pictures_with_an_empty_prompt_are_told_from_those_that_are_not_named(folder, tmp_path, capsys):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("image,prompt\na1.png,one\na2.webp,\nA9.png, \n")
    run("rewards", "score", folder, pairs, "--reward", RED, "-o", tmp_path / "s.csv")
    assert list(pd.read_csv(tmp_path / "s.csv")["image"]) == ["a1.png"]
    said = capsys.readouterr().out
    assert f"2 of 5 pictures in {folder} have an empty prompt in {pairs} and are not scored" in said
    assert f"2 of 5 pictures in {folder} are not named in {pairs} and are not scored" in said
    pairs.write_text("image,prompt\na1.png,\n")
    assert complaint(capsys, "rewards", "score", folder, pairs, "--reward", RED) == f"{pairs}: no prompts in it"


def test_the_prompts_are_not_written_over(folder, tmp_path, capsys, monkeypatch):
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("image,prompt\na1.png,one\n")
    monkeypatch.chdir(tmp_path)
    said = complaint(capsys, "rewards", "score", folder, pairs, "--reward", RED, "-o", "pairs.csv")
    assert said == "-o: 'pairs.csv' is the prompts' own file, name another"
    assert pairs.read_text() == "image,prompt\na1.png,one\n"


def Counting():
    return lambda images, prompts: torch.arange(len(prompts))


def Complex():
    return lambda images, prompts: images.mean((1, 2, 3)) + 1j


@pytest.mark.parametrize(("name", "kind"), [("Counting", "int64"), ("Complex", "complex64")])
def test_scores_that_are_no_real_numbers_are_refused_as_in_validation(folder, prompts, tmp_path, capsys, name, kind):
    expected = f"reward test_score_folder:{name}: scores of torch.{kind}, expected floating point"
    ask = ["--reward", f"test_score_folder:{name}", "-o", tmp_path / "s.csv"]
    assert fails(capsys, "rewards", "score", folder, prompts, *ask) == expected
    assert fails(capsys, "rewards", "validate", f"test_score_folder:{name}", "--images", folder).splitlines()[-1] == expected


def test_a_reward_that_fails_is_named_and_nothing_is_written(folder, prompts, tmp_path, capsys):
    prompts.write_text("one\ntwo\nthree\nbroken\nfive\n")
    out = tmp_path / "s.csv"
    said = fails(capsys, "rewards", "score", folder, prompts, "--reward", RED, "--reward", "tiny.rewards:Broken", "-o", out)
    assert said == "reward tiny.rewards:Broken: 1 of 2 scores are not finite"
    assert not list(tmp_path.glob("*s.csv*"))
    (tmp_path / "taken.csv").mkdir()
    said = complaint(capsys, "rewards", "score", folder, prompts, "--reward", RED, "-o", tmp_path / "taken.csv")
    assert said == f"{tmp_path}/taken.csv: Is a directory" and not list(tmp_path.glob(".taken*"))


# --------------------------------------------------------------------------------------------------------- test
def test_test_prints_each_check_with_what_was_seen(capsys):
    run("rewards", "validate", "pocket_preference")
    said = dict(re.match(r"(\S+) +(.*)", line).groups() for line in capsys.readouterr().out.splitlines())
    assert said["declared"] == NAMES["pocket_preference"].range
    assert "on 64 pictures" in said["score_range"] and "the gradient misses at most" in said["gradient_matches_differences"]
    assert said["reward"] == "pocket_preference can be trained on"


def test_a_reward_in_the_folder_where_one_types_is_found(folder, prompts, monkeypatch, tmp_path, capsys):
    source = "def Warmth():\n    return lambda images, prompts: (images[:, 0] - images[:, 2]).flatten(1).mean(1)\n"
    (tmp_path / "warmth_of_mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    run("rewards", "score", folder, prompts, "--reward", "warmth_of_mine:Warmth")
    assert "warmth_of_mine:Warmth  " in capsys.readouterr().out


def test_test_refuses_by_name_on_pictures_of_ones_own(folder, prompts, capsys):
    """Those of the first picture's size; and what cannot be trained on may still judge."""
    where = ["--images", folder, "--prompts", prompts]
    said = fails(capsys, "rewards", "validate", "test_score_folder:WrongSign", *where)
    assert re.fullmatch(r"reward test_score_folder:WrongSign: its gradient is not that of its scores: .*", said)
    run("rewards", "validate", "test_score_folder:WrongSign", *where, "--held-out")
    out = capsys.readouterr().out
    assert "on 4 pictures" in out  # three, and a dimmed one
    assert out.endswith("reward test_score_folder:WrongSign can be held out\n")
    assert "gradient_matches_differences" not in out and "declared" not in out


def test_test_takes_pictures_alone_and_prompts_alone(folder, prompts, capsys):
    run("rewards", "validate", "test_score_folder:Honest", "--images", folder)
    run("rewards", "validate", RED, "--prompts", prompts)
    out = capsys.readouterr().out
    assert f"{'remark':<30}other prompts made no difference to its scores" in out
    assert "on 64 pictures" in out  # the pocket world's, of these five prompts


def test_test_says_what_is_wrong(folder, prompts, tmp_path, capsys):
    assert (
        complaint(capsys, "rewards", "validate", "pikscore")
        == "rewards validate: no reward is named 'pikscore', did you mean 'pickscore'?"
    )
    assert "cannot load 'tiny.rewards:Nobody'" in complaint(
        capsys, "rewards", "validate", "tiny.rewards:Nobody", "--images", folder
    )
    shutil.rmtree(folder)
    assert complaint(capsys, "rewards", "validate", RED, "--images", folder).startswith(f"{folder}: no such folder")


def test_captions_of_a_folder_belong_to_the_pictures_of_their_names(tmp_path, capsys):
    """In the order of either side's names alone, 10 would come before 2 and every score would be of another's prompt."""
    for name in ("1", "2", "10"):
        paint(tmp_path / f"{name}.png", 100)
        (tmp_path / f"{name}.txt").write_text(f"picture {name}")
    table = pictures_with_prompts(tmp_path, tmp_path)
    assert dict(zip(table["image"], table["prompt"], strict=True)) == {f"{n}.png": f"picture {n}" for n in (1, 2, 10)}
    (tmp_path / "2.txt").unlink()
    assert pictures_with_prompts(tmp_path, tmp_path)["image"].tolist() == ["1.png", "10.png"]
    assert "1 of 3 pictures" in capsys.readouterr().out
    (tmp_path / "3.txt").write_text("picture 3")
    with pytest.raises(UserError, match=r"no picture '3' in "):
        pictures_with_prompts(tmp_path, tmp_path)


def test_a_pointer_in_a_pictures_place_is_said(tmp_path):
    (tmp_path / "1.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=r"1.png: is a pointer of Git LFS and not the file itself"):
        read_picture(tmp_path / "1.png")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff"])
def test_several_pictures_in_one_file_are_not_taken_for_the_first(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), (red, 0, 0)) for red in (200, 100)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=f"a{suffix}: is 2 pictures in one file; save the one that is meant"):
        read_picture(tmp_path / f"a{suffix}")


def test_pictures_of_other_kinds_count_and_folders_do_not(tmp_path):
    names = ["1.bmp", "2.TIFF", "3.jfif", "4.avif"]
    for name in names:
        Image.new("RGB", (8, 6), (200, 0, 0)).save(tmp_path / name, format="JPEG" if name == "3.jfif" else None)
    (tmp_path / "5.png").mkdir()
    (tmp_path / "prompts.csv").write_text("prompt\n" + "a picture\n" * 4)
    table = pictures_with_prompts(tmp_path, tmp_path / "prompts.csv")
    assert table["image"].tolist() == names
    assert all(abs(read_picture(tmp_path / name)[0].mean() - 200 / 255) < 0.02 for name in names)


def test_a_grey_of_16_bits_is_white_where_it_is_transparent(tmp_path):
    Image.new("I;16", (4, 4), 13_107).save(tmp_path / "grey.png", transparency=13_107)
    assert read_picture(tmp_path / "grey.png").unique().tolist() == [1.0]
