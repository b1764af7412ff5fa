"""Reports: one file that needs nothing else, safe against what it shows, small, and true to the numbers."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from tiny import sweeps as tiny_sweep

from diffinstruct.cli.main import main
from diffinstruct.reports import plots
from diffinstruct.reports.frames import load_sweep, measures, points, swept
from diffinstruct.reports.page import MOST_BYTES
from diffinstruct.tracking.records import read_journal

EVIL = "<script>alert(1)</script>"


def page(path, tmp_path) -> str:
    out = tmp_path / "out.html"
    assert main(["report", str(path), "-o", str(out)]) == 0
    return out.read_text()


class Page(HTMLParser):
    """The tags of a page with their attributes, and its rows of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data.strip()

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_runs_report_says_what_it_was_and_what_came_of_it(tmp_path):
    events = [(0, "reward.x", "reward x: scores 1 to 2"), (10, "overoptimization", "reward hacking: beyond 3.5")]
    folder = tiny_sweep.run(
        tmp_path / "one",
        {"objective.reward_scale": 4.5},
        courses=tiny_sweep.WATCHED,
        evaluation={"kid": 1.25},
        events=events,
        grids=(0, 50, 100),
    )
    text = page(folder, tmp_path)
    found = Page(text)
    assert ["objective.reward_scale", "2.0", "4.5"] in found.rows
    assert ["kid", "KID to the reference", "1.2 [0.8, 1.8]", "9"] in found.rows
    assert ["overoptimization/unexplained", "1.5"] in found.rows
    assert ["10", "overoptimization", "reward hacking: beyond 3.5"] in found.rows
    assert '<p class="alarm">reward hacking' in text
    assert "abc1234" in text
    head = next(row for row in found.rows if "start" in row)
    assert head == ["", "start", "step 50", "step 100", "step 100, other noise", "and other"]
    assert len(found.named("img")) == 1 + 8 * 5  # curves, and eight prompts
    assert found.rows[1][0] == "an agave in a frowning mint pot on a green background"


def test_a_page_needs_nothing_else(tmp_path):
    folder = tiny_sweep.sweep(tmp_path / "s", grids=(0, 100))
    for path in (folder, folder / "w1-r1-s0"):
        found = Page(page(path, tmp_path))
        assert not found.named("script")
        addresses = [of.get(key) for _, of in found.tags for key in ("src", "href") if key in of]
        assert addresses and all(address.startswith("data:") for address in addresses)


def test_what_others_wrote_is_shown_and_not_run(tmp_path):
    """Prompts, reasons, events, names of runs and tags come from files and from rewards."""
    (tmp_path / "prompts.txt").write_text(f"{EVIL}\n" * 8)
    evil = {"prompts.grid": tmp_path / "prompts.txt"}
    events = [(0, EVIL, EVIL), (10, "hacking", EVIL)]
    for name in ("one", "<b>two"):
        run = tiny_sweep.run(tmp_path / "s" / name, evil, "FAILED", EVIL, events=events, grids=(0, 10))
        record = {"time": 1, "start": {"tags": {EVIL: EVIL}}}
        journal = (run / "journal.jsonl").read_text().replace('"tags": {"mlflow.source.git.commit"', f'"tags": {{"{EVIL}"')
        (run / "journal.jsonl").write_text(json.dumps(record) + "\n" + journal)
    for path in (tmp_path / "s", tmp_path / "s" / "<b>two"):
        text = page(path, tmp_path)
        assert "<script" not in text and "<b>two" not in text
        assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2


def test_a_page_is_small_whatever_the_pictures(tmp_path):
    """Noise does not compress: these grids are 40 MB and more."""
    folder = tmp_path / "s"
    for i in range(4):
        scale = {"objective.reward_scale": float(i)}
        tiny_sweep.run(folder / str(i), scale, evaluation=tiny_sweep.evaluated(i, i, i), grids=(0, 10), edge=256)
    assert sum(file.stat().st_size for file in folder.rglob("*.png")) > 40e6
    for path in (folder, folder / "3"):
        text = page(path, tmp_path)
        assert len(text.encode()) < MOST_BYTES
        assert "shrunk from 256 to 224 pixels" in text


def test_lists_have_an_end_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("diffinstruct.reports.page.MOST_ROWS", 2)
    monkeypatch.setattr("diffinstruct.reports.page.MOST_EVENTS", 1)
    folder = tiny_sweep.sweep(tmp_path / "s", events=[(1, "a", "x"), (2, "b", "y"), (3, "c", "z" * 5000)])
    text = page(folder, tmp_path)
    assert "6 more trials are left out" in text and len(re.findall('<tr class="finished">', text)) == 2
    assert "2 more are in the run" in page(folder / "w1-r1-s0", tmp_path)
    monkeypatch.setattr("diffinstruct.reports.page.MOST_EVENTS", 3)
    text = page(folder / "w1-r1-s0", tmp_path)
    assert "z" * 999 + "…" in text and "z" * 1000 not in text


def test_a_sweeps_table_is_in_the_order_of_the_held_out_reward_and_marks_what_went_wrong(tmp_path):
    folder = tiny_sweep.sweep(tmp_path / "s")
    hacked = {"events": [(10, "hacking", "x")], "evaluation": tiny_sweep.evaluated(9, 9, 9)}
    tiny_sweep.run(folder / "hacked", {"objective.reward_scale": 2.0, "seed": 7}, courses=tiny_sweep.WATCHED, **hacked)
    tiny_sweep.run(folder / "broken", {"seed": 8}, end="FAILED", reason="NonFinite: no", courses={})
    text = page(folder, tmp_path)
    trials = [row for row in Page(text).rows if re.fullmatch(r"hacked|broken|w\S+", row[0])]
    assert trials[0][:3] == ["hacked", "1", "2"] and trials[-1][0] == "broken" and len(trials) == 10
    held_out = [float(row[6].split()[0]) for row in trials[:-1]]
    assert held_out == sorted(held_out, reverse=True)
    assert "over-optimization: first alarm at step 10" in text and "failed: NonFinite: no" in text
    assert '<tr class="hacked remarked">' in text and '<tr class="failed remarked">' in text
    assert "10 trials:" in text and "9 finished, 1 failed; an alarm of over-optimization in 1" in " ".join(text.split())


def test_a_sweep_of_one_trial_and_one_without_metrics_have_their_page(tmp_path):
    tiny_sweep.run(tmp_path / "s" / "one", end=None, courses={})
    text = page(tmp_path / "s", tmp_path)
    assert "A sweep of 1 trial:" in text and "no key of the configuration differs" in text
    assert "No metrics yet." in page(tmp_path / "s" / "one", tmp_path)


def test_kept_rows_have_a_report(tmp_path):
    rows = "trial,commit,at,seed,held_out/judge,reward/judge,objective.distance_args.c\n"
    (tmp_path / "rows.csv").write_text(rows + "a,c0ffee,2026-01-01,0,1,2,\nb,c0ffee,2026-01-01,0,1,3,0.5\n")
    found = Page(page(tmp_path / "rows.csv", tmp_path))
    assert ["objective.distance_args.c", "0.5, as the recipe"] in found.rows
    assert [row[:2] for row in found.rows if row[0] in "ab"] == [["b", "0.5"], ["a", "–"]]


@pytest.mark.parametrize(
    ("out", "said"), [("o.pdf", "-o: should be a .html file, got 'o.pdf'"), ("nowhere/o.html", "-o: no folder 'nowhere'")]
)
def test_where_it_cannot_be_written_is_said_first(tmp_path, capsys, out, said):
    assert main(["report", str(tmp_path / "no run"), "-o", out]) == 2
    assert capsys.readouterr().err == said + "\n"


# ------------------------------------------------------------------------------------------------------- figures
def test_the_columns_of_a_grid_are_the_runs():
    from diffinstruct.training.run_log import GRID_NOISES

    assert plots.COLUMNS == 1 + GRID_NOISES


def test_a_grid_is_cut_into_its_pictures(tmp_path):
    whole = Image.new("RGB", (8, 6), "white")
    whole.paste("red", (2, 2, 4, 4))  # second row, second column
    whole.save(tmp_path / "grid.png")
    rows = plots.cells(tmp_path / "grid.png")
    assert [len(row) for row in rows] == [4, 4, 4]
    red = [(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if cell.getpixel((0, 0)) == (255, 0, 0)]
    assert red == [(1, 1)] and rows[1][1].getcolors() == [(4, (255, 0, 0))]
    (tmp_path / "grid.png").write_bytes(b"torn")
    assert plots.cells(tmp_path / "grid.png") == []


def drawn(monkeypatch, draw):
    """The axes of a figure that `draw` draws."""
    kept = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda picture, path: kept.append(picture))
    returned = draw()
    return kept[0].axes, returned


def test_heat_maps_say_the_mean_over_seeds(tmp_path, monkeypatch):
    frame = load_sweep(tiny_sweep.sweep(tmp_path / "s", scales=(1.0, 2.0, 4.0)))
    x, y = swept(frame)
    axes, _ = drawn(monkeypatch, lambda: plots.heat_maps(frame, measures(frame), x, y, tmp_path / "h.png"))
    titles = [axis.get_title().partition(",")[0] for axis in axes]
    assert titles[:3] == ["trained reward", "held-out reward", "KID to the reference"]
    assert titles[3:5] == ["diversity", "trained minus held-out gain"]
    said = [text.get_text() for text in axes[1].texts]  # rows from below: scale 1, 2, 4; columns: weight 0.5, 1
    assert said == ["3.05", "2.55", "4.05", "3.05", "6.05", "4.05"]
    assert [label.get_text() for label in axes[1].get_xticklabels()] == ["0.5", "1"]


def test_the_pareto_figure_names_its_front_and_shows_it(tmp_path, monkeypatch):
    frame = load_sweep(tiny_sweep.sweep(tmp_path / "s", grids=(0, 20)))
    of, keys, by_point = measures(frame), swept(frame), points(frame)
    axes, letters = drawn(monkeypatch, lambda: plots.pareto(by_point, of, keys, tmp_path / "p.png"))
    assert letters["A"] == "regularization_weight 1, reward_scale 1"
    assert {line.get_xdata()[0] for line in axes[1].lines if len(line.get_xdata()) == 1} == {1.0, 2.0, 4.0}
    assert len(axes[0].child_axes) == 1 + len(letters)
    assert (tmp_path / "p.png").exists() is False  # nothing is written but by savefig
    with pytest.raises(ValueError, match="takes a held-out reward and a distance"):
        plots.pareto(by_point, type(of)(of.trained, None, of.distance, None), keys, tmp_path / "p.png")


def test_the_letters_of_a_long_front_lie_apart():
    crowd = np.linspace(0, 0.01, 40)
    path = np.array([*zip(crowd, crowd, strict=True), (50.0, 0.5), (100.0, 1.0)])
    assert plots._apart(path, 8) == [0, 40, 41]
    assert plots._apart(np.array([[0.0, 1.0], [0.5, 1.0], [1.0, 1.0]]), 8) == [0, 1, 2]  # flat
    assert plots._apart(np.array([[2.0, 3.0]]), 8) == [0]
    assert plots._apart(np.array([[2.0, 3.0]] * 9), 8) == [0]  # all of them equal


def test_curves_are_means_over_seeds_in_their_band(tmp_path, monkeypatch):
    from diffinstruct.reports.frames import learning_curves

    for seed, end in enumerate((4.0, 5.0)):
        course = {"reward/x": [3.0, end]}
        tiny_sweep.run(tmp_path / "s" / str(seed), {"seed": seed}, courses=course, events=[(20, "hacking", "!")])
    frame, values = load_sweep(tmp_path / "s"), learning_curves(tmp_path / "s")
    axes, _ = drawn(monkeypatch, lambda: plots.curves(values, frame, {"reward/x": "x"}, tmp_path / "c.png"))
    mean, *crosses = axes[0].lines
    assert mean.get_xydata().tolist() == [[10, 3.0], [20, 4.5]]
    assert [cross.get_xydata().tolist() for cross in crosses] == [[[20, 4.0]], [[20, 5.0]]]
    band = axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 3.0 and band[:, 1].max() == 5.0


def test_prompts_beside_pictures_are_no_mathematics(tmp_path):
    """matplotlib would read $...$ as TeX, and fail on what is none."""
    picture = Image.new("RGB", (4, 4))
    plots.picture_grid(["costs $5 \\frac{ $"], {"a$^$b$": [picture]}, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width > 1000


def test_a_sweep_that_has_not_begun_all_its_trials_says_so(tmp_path):
    folder = tiny_sweep.sweep(tmp_path / "s")
    start = {"time": 1, "start": {"name": "s", "params": {}, "tags": {"trials": "12"}}}
    (folder / "journal.jsonl").write_text(json.dumps(start) + "\n")
    assert "A sweep of 12 trials:\n8 finished, 4 not begun" in page(folder, tmp_path)


def test_files_that_are_not_the_runs_own_spoil_no_report(tmp_path, caplog, capsys):
    folder = tiny_sweep.sweep(tmp_path / "s", grids=(0, 10))
    run = folder / "w1-r1-s0"
    (run / "images" / "grid-final.png").write_bytes(b"x")
    with (run / "journal.jsonl").open("a") as journal:
        journal.write('{"time": 1, "metrics": {"a": 1}}\nnot json\n')
    assert "8 finished" in page(folder, tmp_path)
    assert f"{run / 'journal.jsonl'}: the line at byte " in caplog.text
    (run / "metrics.json").write_text("[1, 2]")
    assert main(["report", str(folder), "-o", str(tmp_path / "out.html")]) == 2
    assert capsys.readouterr().err == f"{run}/metrics.json: should be metrics by name, got [1, 2]\n"


def test_records_that_lack_what_is_asked_of_them_are_left_out(tmp_path, caplog):
    of_a_run = {"time": 1, "step": 1}
    odd = [
        {"step": 1, "metrics": {"x0_gap": 1.0}},
        {"time": "now", "step": 1, "metrics": {"x0_gap": 1.0}},
        {"time": 10**18, "step": 1, "metrics": {"x0_gap": 1.0}},
        of_a_run | {"metrics": {"x0_gap": "far"}},
        of_a_run | {"event": "hacking"},
        of_a_run | {"event": "hacking", "text": 5},
        of_a_run | {"event": "back_to", "text": "back", "back_to": "x"},
        of_a_run | {"image": "images/a.png"},
        {"time": 1, "finish": "FAILED"},
        {"time": 1, "start": {"tags": {"a": 5}}},
        {"a": 1},
    ]
    folder = tiny_sweep.run(tmp_path / "one")
    with (folder / "journal.jsonl").open("a") as journal:
        journal.writelines(json.dumps(record) + "\n" for record in odd)
    page(folder, tmp_path)
    caplog.clear()
    assert all(record not in odd for record in read_journal(folder))
    assert len(caplog.records) == len(odd) and all("cannot be read" in record.getMessage() for record in caplog.records)
