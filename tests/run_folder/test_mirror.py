"""A run's copy in an object store: machines that are gone, stores that are away, uploads that break off anywhere.

The store is fsspec's own in memory, by the interface that all of them have.
"""

from __future__ import annotations

import itertools
import shutil

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from tiny.runs import agree, journal, same

from diffinstruct.cli.main import main
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.inputs import check_inputs
from diffinstruct.config.reading import load
from diffinstruct.errors import ConfigErrors, UserError
from diffinstruct.locks import only_writer
from diffinstruct.method.step import alternating_round
from diffinstruct.run_folder import mirror, signals
from diffinstruct.run_folder.checkpoint import CheckpointStore
from diffinstruct.run_folder.location import folder_of_run
from diffinstruct.run_folder.mirror import Mirror
from diffinstruct.run_folder.signals import Paused, Signal
from diffinstruct.training import local

URL = "memory://bucket/runs"
WRITES = ("put_file", "pipe_file", "rm_file")


@pytest.fixture(autouse=True)
def empty_store(monkeypatch):
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    monkeypatch.setattr(mirror, "INTERVAL", 0.05)
    monkeypatch.setattr(mirror, "ATTEMPTS", 1)


@pytest.fixture(scope="module")
def experiment(world, tmp_path_factory):
    """experiment(**changes), tracked in one database."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"
    plain = {"tracking__uri": uri, "overoptimization__every": 0, "logging__checkpoint_every": 2, "steps": 6, "mirror": URL}
    return lambda **changes: world[1](**plain | changes)


def state(step):
    return {"weights": torch.full((3,), float(step)), "step": step}


def saved(folder, *steps):
    """A run's folder with these checkpoints."""
    store = CheckpointStore(folder / "checkpoints")
    for step in steps:
        store.save(step, state(step))
    (folder / "journal.jsonl").write_text("{}\n" * max(steps))
    return folder


def read(folder):
    return CheckpointStore(folder / "checkpoints").latest()


def away(monkeypatch, names=(*WRITES, "ls", "cat_file", "get_file")):
    def nothing(*arguments, **options):
        raise ConnectionError("no route to the store")

    for name in names:
        monkeypatch.setattr(MemoryFileSystem, name, nothing)


# ------------------------------------------------------------------------------------------------------- the copy
def test_a_folder_that_is_lost_comes_back(tmp_path):
    folder = saved(tmp_path / "run", 1, 2)
    (folder / "images").mkdir()
    (folder / "images/grid-1.png").write_bytes(b"a picture")
    (folder / "lock").touch()
    (folder / "checkpoints/step-00000003.tmp").mkdir()
    Mirror(URL, folder).push()
    files, root = fsspec.url_to_fs(f"{URL}/run")
    names = ("manifest.json", "state.json", "tensors.safetensors")
    steps = [f"checkpoints/step-0000000{step}/{name}" for step in (1, 2) for name in names]
    found = sorted(path.removeprefix(root).strip("/") for path in files.find(root))
    assert found == [*steps, "images/grid-1.png", "journal.jsonl"]

    shutil.move(folder, tmp_path / "lost")
    folder.mkdir()
    assert Mirror(URL, folder).pull() == 2
    assert same(read(folder), (2, state(2))) and CheckpointStore(folder / "checkpoints").steps() == [2, 1]
    assert (folder / "journal.jsonl").read_text() == "{}\n{}\n" and (folder / "images/grid-1.png").read_bytes() == b"a picture"
    assert Mirror(URL, folder).pull() is None  # nothing newer there


def test_how_far_trackers_are_goes_with_the_journal(tmp_path):
    """But for TensorBoard's: its files stay where they are, and are made again."""
    folder = saved(tmp_path / "run", 1)
    (folder / "tensorboard").mkdir()
    for name in ("journal.ack", "mine.ack", "tensorboard.ack", "tensorboard/events.out.tfevents.1"):
        (folder / name).write_text("{}")
    Mirror(URL, folder).push()
    files, root = fsspec.url_to_fs(f"{URL}/run")
    assert not files.exists(f"{root}/tensorboard") and not files.exists(f"{root}/tensorboard.ack")

    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    for name in ("tensorboard.ack", "old.ack"):  # of a journal that is replaced
        (other / name).write_text("{}")
    assert Mirror(URL, other).pull() == 1
    assert sorted(path.name for path in other.glob("*.ack")) == ["journal.ack", "mine.ack"]


def test_what_the_folder_has_no_more_goes(tmp_path):
    folder = saved(tmp_path / "run", 2, 4)
    Mirror(URL, folder).push()
    CheckpointStore(folder / "checkpoints").save(3, state(3))  # it has gone back
    CheckpointStore(folder / "checkpoints").save(4, {"another": 4})
    Mirror(URL, folder).push()
    shutil.rmtree(folder)
    folder.mkdir()
    assert Mirror(URL, folder).pull() == 4 and read(folder) == (4, {"another": 4})
    assert CheckpointStore(folder / "checkpoints").steps() == [4, 3]


def test_a_folder_that_is_ahead_stays(tmp_path):
    folder = saved(tmp_path / "run", 1)
    Mirror(URL, folder).push()
    saved(folder, 2)
    assert Mirror(URL, folder).pull() is None and read(folder)[0] == 2


def test_a_folder_that_is_behind_leaves_its_copy_alone(experiment, tmp_path, capsys):
    """An old disk, and `sync` on it."""
    run = tmp_path / "run"
    local.run(experiment(), run)
    before = dict(MemoryFileSystem.store)
    shutil.rmtree(run / "checkpoints/step-00000006")
    with (run / "journal.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(SystemExit):
        main(["sync", str(run)])
    assert f": {run} lacks step 6 of {URL}/run: the run's command brings it" in capsys.readouterr().err
    assert MemoryFileSystem.store == before
    with only_writer(run):
        assert main(["sync", str(run)]) == 0  # whoever is at work on it copies it
    assert "is at work on this run" in capsys.readouterr().err


def test_a_run_that_is_to_end_at_once_copies_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "_push_at_the_end", lambda mirror: pytest.fail("it should end"))
    monkeypatch.setattr(mirror, "INTERVAL", 1000.0)
    with pytest.raises(KeyboardInterrupt), mirror.mirrored(URL, saved(tmp_path / "run", 1)):
        raise KeyboardInterrupt


def test_an_upload_that_breaks_off_anywhere_leaves_a_whole_one(tmp_path, monkeypatch):
    """At every call that writes, in turn: what then comes back is the checkpoint before or the new one, never a
    part."""
    came = []
    for at in itertools.count():
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
        folder = saved(tmp_path / f"{at}/run", 1, 2)
        Mirror(URL, folder).push()
        saved(folder, 3)
        calls = itertools.count()

        def broken(sound, at=at, calls=calls):
            def called(*arguments, **options):
                if next(calls) == at:
                    raise ConnectionResetError("the machine is gone")
                return sound(*arguments, **options)

            return called

        with monkeypatch.context() as patch:
            for name in WRITES:
                patch.setattr(MemoryFileSystem, name, broken(getattr(MemoryFileSystem, name)))
            try:
                Mirror(URL, folder).push()
                whole = True
            except ConnectionResetError:
                whole = False
        fresh = tmp_path / f"{at}/fresh/run"
        fresh.mkdir(parents=True)
        came.append(Mirror(URL, fresh).pull())
        assert same(read(fresh), (came[-1], state(came[-1])))
        Mirror(URL, folder).push()  # goes on where it was
        assert sorted(Mirror(URL, folder)._stored_steps()) == [2, 3]
        if whole:
            break
    assert len(came) == 8 and came == sorted(came) and {2, 3} == set(came)  # type: ignore[type-var]


@pytest.mark.parametrize("harm", ["flipped", "missing", "cut"])
def test_a_damaged_copy_is_named_and_left_out(harm, tmp_path, caplog):
    folder = saved(tmp_path / "run", 1, 2)
    Mirror(URL, folder).push()
    files, root = fsspec.url_to_fs(f"{URL}/run/checkpoints/step-00000002/tensors.safetensors")
    content = files.cat_file(root)
    files.rm_file(root)
    if harm != "missing":
        files.pipe_file(root, content[:-1] + (bytes([content[-1] ^ 1]) if harm == "flipped" else b""))
    shutil.rmtree(folder)
    folder.mkdir()
    assert Mirror(URL, folder).pull() == 1 and same(read(folder), (1, state(1)))
    assert "step-00000002" in caplog.text and "tensors.safetensors" in caplog.text


def harmed(folder, step, harm):
    place = folder / f"checkpoints/step-{step:08d}"
    if harm == "no manifest":
        (place / "manifest.json").unlink()
    elif harm == "empty":
        shutil.rmtree(place)
        place.mkdir()
    else:
        name, content = ("tensors.safetensors", None) if harm == "flipped" else ("manifest.json", b" ")
        before = (place / name).read_bytes()
        (place / name).write_bytes(before[:-1] + (content + before[-1:] if content else bytes([before[-1] ^ 1])))


@pytest.mark.parametrize("harm", ["flipped", "manifest", "empty"])
def test_what_is_damaged_here_comes_from_there(harm, tmp_path):
    folder = saved(tmp_path / "run", 1, 2)
    Mirror(URL, folder).push()
    for step in (1, 2):
        harmed(folder, step, harm)
    Mirror(URL, folder).push()  # which takes nothing from there
    assert Mirror(URL, folder).pull() == 2 and same(read(folder), (2, state(2)))
    harmed(folder, 2, harm)
    assert Mirror(URL, folder).pull() == 2 and same(read(folder), (2, state(2)))
    saved(folder, 3)
    harmed(folder, 3, harm)  # newer than all there, and no use
    assert Mirror(URL, folder).pull() is None and same(read(folder), (2, state(2)))


def test_a_pull_that_breaks_off_anywhere_is_done_again(tmp_path, monkeypatch):
    folder = saved(tmp_path / "run", 1, 2)
    (folder / "images").mkdir()
    (folder / "images/grid-1.png").write_bytes(b"a picture")
    Mirror(URL, folder).push()
    for at in itertools.count():
        fresh, calls = tmp_path / f"{at}/run", itertools.count()
        fresh.mkdir(parents=True)
        sound = MemoryFileSystem.get_file

        def broken(*arguments, at=at, calls=calls, sound=sound, **options):
            if next(calls) == at:
                raise ConnectionResetError("gone")
            return sound(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "get_file", broken)
            try:
                whole = Mirror(URL, fresh).pull() == 2
            except ConnectionResetError:
                whole = False
        if whole:
            break
        assert Mirror(URL, fresh).pull() == 2
        assert same(read(fresh), (2, state(2))) and (fresh / "journal.jsonl").read_text() == "{}\n{}\n"
        assert (fresh / "images/grid-1.png").exists()
    assert at == 6  # two checkpoints of two files, a picture, the journal


@pytest.mark.parametrize("harm", ["no manifest", "half a manifest", "no tensors"])
def test_what_is_damaged_here_keeps_nothing_else_from_being_copied(harm, tmp_path, caplog):
    folder = saved(tmp_path / "run", 1, 2)
    place = folder / "checkpoints/step-00000001"
    if harm == "half a manifest":
        (place / "manifest.json").write_bytes((place / "manifest.json").read_bytes()[:-5])
    else:
        (place / {"no manifest": "manifest.json", "no tensors": "tensors.safetensors"}[harm]).unlink()
    Mirror(URL, folder).push()
    assert "checkpoint 1 of" in caplog.text
    shutil.rmtree(folder)
    folder.mkdir()
    assert Mirror(URL, folder).pull() == 2 and CheckpointStore(folder / "checkpoints").steps() == [2]


@pytest.mark.parametrize("manifest", ['{"../../../evil": {}}', '{"evil.py": {}}', "[[1]]", "no JSON", "7"])
def test_names_from_a_store_stay_in_their_folder(manifest, tmp_path, caplog):
    folder = saved(tmp_path / "run", 1)
    Mirror(URL, folder).push()
    files, root = fsspec.url_to_fs(f"{URL}/run")
    files.pipe_file(f"{root}/checkpoints/step-00000002/manifest.json", manifest.encode())
    files.pipe_file(f"{root}/evil", b"evil")
    files.pipe_file(f"{root}/checkpoints/step-00000002/evil.py", b"evil")
    files.pipe_file(f"{root}/images/evil.py", b"evil")
    shutil.rmtree(folder)
    folder.mkdir()
    assert Mirror(URL, folder).pull() == 1
    assert "step-00000002" in caplog.text and not list(tmp_path.rglob("*evil*"))


# -------------------------------------------------------------------------------------------------------- the run
def test_a_run_goes_on_where_its_machine_is_gone(experiment, tmp_path, monkeypatch, capsys):
    asked, run = experiment(), tmp_path / "run"
    local.run(experiment(mirror=None), tmp_path / "whole")

    def paused(train_state, settings, schedule, draws, *rest):
        if draws.step == 2:
            signals.request(run, Signal.PAUSE)
        return alternating_round(train_state, settings, schedule, draws, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("diffinstruct.training.loop.alternating_round", paused)
        with pytest.raises(Paused):
            local.run(asked, run)
    shutil.move(run, tmp_path / "lost")
    capsys.readouterr()
    local.run(asked, run)
    assert f"step 3 comes from {URL}/run\n" in (shown := capsys.readouterr().out) and "  from step 3  tracking" in shown
    one, other = (CheckpointStore(of / "checkpoints").latest() for of in (run, tmp_path / "whole"))
    assert one[0] == other[0] == 6 and same(one[1]["train_state"], other[1]["train_state"])
    agree(run, tmp_path / "whole", rel=0)
    assert journal(run)[1] == ["KILLED", "FINISHED"]
    # Of what it leaves all is there, the model too
    files, root = fsspec.url_to_fs(f"{URL}/run")
    name = "export/unet/diffusion_pytorch_model.safetensors"
    assert files.cat_file(f"{root}/{name}") == (run / name).read_bytes()
    assert files.cat_file(f"{root}/journal.jsonl") == (run / "journal.jsonl").read_bytes()
    assert not files.exists(f"{root}/lock")


def test_a_store_that_is_away_stops_nothing_and_sync_delivers(experiment, tmp_path, monkeypatch, caplog, capsys):
    asked = experiment(output_dir=str(tmp_path))
    run = folder_of_run(asked)

    def lost(train_state, settings, schedule, draws, *rest):
        away(patch)
        return alternating_round(train_state, settings, schedule, draws, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("diffinstruct.training.loop.alternating_round", lost)
        local.run(asked, run)
        assert journal(run)[1] == ["FINISHED"]
        told = [record.getMessage() for record in caplog.records if URL in record.getMessage()]
        assert any("takes nothing: ConnectionError: no route to the store. The run goes on" in line for line in told)
        assert told[-1].startswith("not all of this run is at ") and told[-1].endswith(f"; later: diffinstruct sync {run}")
        with pytest.raises(SystemExit):
            main(["sync", str(run)])
        assert f"{run}: mirror: ConnectionError: no route to the store" in capsys.readouterr().err
        # Nor does it keep a run from going on that has its folder
        local.run(asked, run)
    assert main(["sync", str(run)]) == 0 and f"{run}: all of it is at {URL}" in capsys.readouterr().out
    shutil.rmtree(run)
    run.mkdir()
    assert Mirror(URL, run).pull() == 6


def test_a_run_does_not_start_over_because_its_store_is_away(experiment, tmp_path, monkeypatch):
    away(monkeypatch)
    with pytest.raises(UserError, match=r"mirror: memory://bucket/runs does not answer as it should: ConnectionError"):
        local.run(experiment(), tmp_path / "run")
    assert not (tmp_path / "run/journal.jsonl").exists()


# -------------------------------------------------------------------------------------------------- configuration
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("bucket/runs", "should begin with s3://, gs://, az:// or what else fsspec knows, got 'bucket/runs'"),
        ("s3x://bucket", "or what else fsspec knows, got 's3x://bucket', did you mean 's3'?"),
        ("https://host/runs", "or what else fsspec knows"),
        ("s3://", "should name one bucket or folder"),
        ("simplecache::s3://bucket", "or what else fsspec knows"),
        ("s3://bucket::zip://x", "should name one bucket or folder"),
        ("s3://key:secret@bucket/runs", "should hold no keys"),
        ("s3://key:sec/secret@bucket/runs", "should hold no keys"),
        ("abfs://container@key:secret@account/runs", "should hold no keys"),
        ("az://bucket/runs?sv=1&sig=secret", "should hold no keys"),
        ("file://relative/runs", "should be an absolute path"),
        ("file:///srv/../etc", "should be an absolute path"),
    ],
)
def test_what_is_no_store_is_refused(value, said, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"mirror: {value}\n")
    with pytest.raises(ConfigErrors) as refused:
        load(tmp_path / "recipe.yaml")
    (line,) = refused.value.errors
    assert line.startswith(f"{tmp_path / 'recipe.yaml'}:1: mirror: ") and said in line and "secret" not in line


def test_a_package_that_is_missing_is_told_before_anything_starts():
    with pytest.raises(UserError, match=r"^mirror: wandb://bucket: .*[Ii]nstall wandb"):
        check_inputs(Experiment(mirror="wandb://bucket"))


def test_a_store_that_goes_with_the_process_is_none():
    with pytest.raises(UserError, match="mirror: memory://x: is gone with the process"):
        check_inputs(Experiment(mirror="memory://x"))
    assert Experiment(mirror="abfs://container@account.host/runs").mirror


def test_a_run_is_not_its_own_copy(tmp_path):
    for where in (tmp_path, tmp_path / "run" / "copy"):
        with pytest.raises(UserError, match="is where the run itself lies"):
            Mirror(where.as_uri(), tmp_path / "run")


def test_what_lies_elsewhere_by_a_link_is_not_copied(tmp_path, caplog):
    """As sync of somebody's folder might be led to another run's checkpoints."""
    mine = saved(tmp_path / "mine", 2)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/checkpoints").symlink_to(mine / "checkpoints")
    Mirror(URL, tmp_path / "theirs").push()
    saved(tmp_path / "third", 1)
    (tmp_path / "third/checkpoints/step-00000002").symlink_to(mine / "checkpoints/step-00000002")
    Mirror(URL, tmp_path / "third").push()
    harmed = saved(tmp_path / "fourth", 2) / "checkpoints/step-00000002/manifest.json"
    harmed.unlink()
    harmed.symlink_to(mine / "checkpoints/step-00000002/manifest.json")
    Mirror(URL, tmp_path / "fourth").push()
    copies = [path for path in MemoryFileSystem.store if "manifest" in path]
    assert copies == ["/bucket/runs/third/checkpoints/step-00000001/manifest.json"]
    assert caplog.text.count("is not copied: it lies, by a link, outside of the run's folder") == 2
    assert "is not copied: manifest.json: it is a link" in caplog.text


def test_a_run_does_not_start_over_because_its_copy_is_damaged(tmp_path, caplog):
    run = saved(tmp_path / "run", 2, 4)
    Mirror(URL, run).push()
    shutil.rmtree(run)
    run.mkdir()
    for path in [*MemoryFileSystem.store]:
        if path.endswith("tensors.safetensors"):
            MemoryFileSystem().pipe_file(path, b"half")
    said = f"^mirror: {URL}/run: no checkpoint in it can be read; without it the run begins anew"
    with pytest.raises(UserError, match=said), mirror.mirrored(URL, run):
        pass
    assert caplog.text.count("cannot be used") == 2


def test_where_copies_lie_is_no_part_of_the_configuration():
    assert Experiment(mirror=URL).config_hash == Experiment().config_hash
