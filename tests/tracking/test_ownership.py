"""Whose a directory is: a run replaces and removes what it made there, and nothing else."""

import json
import shutil
import stat
from datetime import date

import pytest

from jaxtune.config.load import dump, load_config
from jaxtune.core.errors import UserError
from jaxtune.tracking.ownership import MARKER, OWN
from jaxtune.tracking.record import is_run, load_run, read_config
from jaxtune.tracking.run_directory import RunDirectory, check_place

DIGESTS = {"data.train": "abc"}


def config_of(directory, *overrides):
    keys = ["model.source=none", "data.train=none", f"run.dir={directory}", *overrides]
    return load_config(overrides=keys)


def opened(config, **options):
    return RunDirectory(config, DIGESTS, date(2026, 1, 1), **options)


def made(config):
    """A finished run as its directory shows it, with a checkpoint; return the directory."""
    run = opened(config)
    run.replacement("adapter").note(["adapter_config.json"])
    (run.path / "adapter").mkdir()
    (run.path / "adapter" / "adapter_config.json").write_text("{}")
    for name in ("metrics.jsonl", "samples.jsonl", "data.json", "verification.json"):
        (run.path / name).write_text("")
    checkpoint = run._place / "3"
    checkpoint.mkdir()
    (checkpoint / "part").write_text("numbers")
    run.before_checkpoint()
    run.close()
    return run.path


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", [name for name in (MARKER, *OWN) if "." in name])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_of_the_users_is_in_the_way_and_stays(name, fresh, tmp_path):
    (tmp_path / name).write_text("[1, 2]")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=name):
        check_place(config_of(tmp_path), fresh)
    with pytest.raises(UserError, match=name):
        opened(config_of(tmp_path), fresh=fresh)
    assert {key: value for key, value in contents(tmp_path).items() if key != ".lock"} == before


@pytest.mark.parametrize("name", ["model", "adapter", "checkpoints", "tensorboard", "profile"])
def test_a_folder_of_the_users_is_in_the_way_and_stays(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "weights.safetensors").write_text("hours of work")
    for fresh in (False, True):
        with pytest.raises(UserError, match=f"holds {name}, which a run would overwrite"):
            opened(config_of(tmp_path), fresh=fresh)
    assert (tmp_path / name / "weights.safetensors").read_text() == "hours of work"


def test_starting_over_removes_what_the_run_made_and_nothing_else(tmp_path):
    config = config_of(tmp_path / "run")
    directory = made(config)
    (directory / "notes.txt").write_text("mine")
    (directory / "data").mkdir()
    (directory / "data" / "rows.jsonl").write_text("{}")
    (directory / "checkpoints" / "thoughts.md").write_text("mine")
    warnings = []
    identity = json.loads((directory / MARKER).read_text())["id"]
    opened(config, fresh=True, warn=warnings.append).close()
    assert set(contents(directory)) == {
        ".lock", "config.yaml", "env.json", "run.json", "notes.txt", "data/rows.jsonl",
        "checkpoints/thoughts.md", "checkpoints/run.json",
    }  # fmt: skip
    assert json.loads((directory / MARKER).read_text())["id"] != identity
    assert warnings == [f"{directory / 'checkpoints'}: what the run did not make stays there."]


def test_checkpoints_may_lie_behind_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").mkdir()
    config = config_of(tmp_path / "run")
    made(config)
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "scratch" / "checkpoints")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch" / "checkpoints")
    opened(config, fresh=True, warn=lambda text: 1 / 0).close()
    assert set(contents(tmp_path / "scratch")) == {"checkpoints/run.json"}
    assert (tmp_path / "run" / "checkpoints").is_symlink()


def test_credentials_of_urls_are_the_owners_alone(tmp_path):
    secret = "https://user:hunter2@example.org/rows.jsonl?token=hunter3"
    config = config_of(
        tmp_path / "run", f"data.train={secret}", f"checkpoint.dir={tmp_path}/bucket"
    )
    made(config)
    holders = {path for path, text in contents(tmp_path).items() if b"hunter" in text}
    assert holders == {"run/config.yaml"}
    assert stat.S_IMODE((tmp_path / "run" / "config.yaml").stat().st_mode) == 0o600
    opened(config, warn=lambda text: None).close()  # it is the same run
    assert read_config(tmp_path / "run") == config


def test_a_file_beside_the_export_is_not_removed_with_it(tmp_path):
    directory = made(config_of(tmp_path / "run"))
    (directory / "adapter" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"adapter holds notes\.md, which the run did not make"):
        check_place(config_of(directory))
    shutil.rmtree(directory / "adapter")
    (directory / "adapter").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is not the folder that the run made"):
        check_place(config_of(directory), fresh=True)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("model.source", "run/model"),
        ("model.source", "run"),
        ("adapter.init", "run/adapter"),
        ("data.train", "run/samples.jsonl"),
        ("data.eval", "run/checkpoints/rows"),
        ("distill.teacher", "bucket/teacher"),
    ],
)
def test_what_a_run_reads_does_not_lie_where_it_writes(key, place, tmp_path):
    path = tmp_path / place
    path.mkdir(parents=True) if path.suffix == "" else (path.parent.mkdir(), path.touch())
    more = ["train.objective=distill"] if key == "distill.teacher" else []
    config = config_of(
        tmp_path / "run", f"checkpoint.dir={tmp_path}/bucket", *more, f"{key}={path}"
    )
    with pytest.raises(UserError, match=rf"{key} = .*(lies where the run writes|own directory)"):
        check_place(config, fresh=True)
    assert path.exists()


def test_a_run_does_not_write_among_its_data(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="what the run writes would be read as data"):
        check_place(config_of(tmp_path / "data" / "run", f"data.train={tmp_path}/data"))


def test_a_directory_of_checkpoints_is_empty_or_the_runs(tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    (bucket / "2024").mkdir()
    (bucket / "2024" / "photo.jpg").write_text("mine")
    config = config_of(tmp_path / "run", f"checkpoint.dir={bucket}")
    for fresh in (False, True):
        with pytest.raises(UserError, match="holds 2024, which no run made there"):
            opened(config, fresh=fresh)
    assert not (tmp_path / "run").exists()
    assert (bucket / "2024" / "photo.jpg").exists()
    shutil.rmtree(bucket)
    made(config)
    other = config_of(tmp_path / "other", f"checkpoint.dir={bucket}")
    with pytest.raises(UserError, match=r"holds the checkpoints of the run in .*run\. Set"):
        opened(other)
    made(config_of(tmp_path / "third"))
    third = config_of(tmp_path / "third", f"checkpoint.dir={bucket}")
    with pytest.raises(UserError, match="holds the checkpoints of another run"):
        opened(third, fresh=True)
    assert (bucket / "3" / "part").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(UserError, match=r"of which .*copy is a copy"):
        opened(load_run(tmp_path / "copy" / "config.yaml"))


def test_a_moved_or_copied_run_is_meant_where_it_lies(tmp_path):
    made(config_of(tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert read_config(tmp_path / "copy").run.dir == str(tmp_path / "copy")
    assert load_run(tmp_path / "copy" / "config.yaml").run.dir == str(tmp_path / "copy")
    elsewhere = load_run(tmp_path / "copy" / "config.yaml", ["run.dir=new", "adapter.rank=4"])
    assert elsewhere.run.dir == "new"
    edited = config_of(tmp_path / "edited")
    (tmp_path / "copy" / "config.yaml").write_text(dump(edited))
    assert load_run(tmp_path / "copy" / "config.yaml").run.dir == str(tmp_path / "edited")


@pytest.mark.parametrize(
    "damage", [b"", bytes(100), b"a: [1,", b"\xff\xfe"], ids=["empty", "zeros", "cut", "binary"]
)
@pytest.mark.parametrize("name", ["config.yaml", "env.json", "data.json", "run.json"])
def test_a_damaged_file_of_the_record_is_written_anew_and_said(name, damage, tmp_path):
    config = config_of(tmp_path / "run")
    directory = made(config)
    (directory / "data.json").write_text('{"train": {}}')
    (directory / name).write_bytes(damage)
    if name == "config.yaml":
        assert is_run(directory)
        assert read_config(directory) == config
    warnings = []
    if name == "run.json":  # the rest says whose it is; the checkpoints say which
        opened(config, warn=warnings.append).close()
        assert json.loads((directory / name).read_text())["config"]["adapter"]["rank"] == 16
        return
    opened(config, warn=warnings.append).close()
    if name in ("config.yaml", "data.json"):
        assert len(warnings) == 1
        assert f"{name} was lost or is damaged" in warnings[0]
    with pytest.raises(UserError, match=r"another configuration: adapter\.rank \(16 there, 8 now"):
        opened(config_of(directory, "adapter.rank=8"))
    with pytest.raises(UserError, match=r"contents of data\.train changed"):
        RunDirectory(config, {"data.train": "other"}, date(2026, 1, 1))


def test_a_record_whose_copy_was_cut_short_does_not_keep_a_run_from_going_on(tmp_path):
    config = config_of(tmp_path / "run", f"checkpoint.dir={tmp_path}/bucket")
    made(config)
    shutil.rmtree(tmp_path / "run")
    record = tmp_path / "bucket" / "record"
    (record / "config.yaml").write_bytes((record / "config.yaml").read_bytes()[:40])
    (record / "samples.jsonl").write_bytes(b"\xff")
    opened(config, warn=lambda text: None).close()
    assert read_config(tmp_path / "run") == config
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_what_a_killed_process_left_is_gone_at_the_next_start(tmp_path):
    config = config_of(tmp_path / "run")
    directory = made(config)
    (directory / ".adapter.jaxtune-new-0123").mkdir()
    (directory / ".adapter.jaxtune-new-0123" / "half").touch()
    (directory / ".config.yaml.jaxtune-new-4567").touch()
    (directory / "adapter").rename(directory / ".adapter.jaxtune-old-89ab")
    opened(config, warn=lambda text: None).close()
    assert not list(directory.glob(".*jaxtune*"))
    assert (directory / "adapter" / "adapter_config.json").exists()


def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    first = opened(config_of(tmp_path / "run"))
    with pytest.raises(UserError, match=r"another process .*\(process \d+ on .+\)"):
        opened(config_of(tmp_path / "run"))
    first.close()
    opened(config_of(tmp_path / "run")).close()
