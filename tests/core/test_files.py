"""Files that are whole or not there, and where what can be made again is kept."""

import os
import stat
from pathlib import Path

import jax
import pytest

from jaxtune.cli.main import main
from jaxtune.core import runtime
from jaxtune.core.errors import UserError
from jaxtune.core.files import (
    Replacement,
    cache_root,
    check_writable,
    new_directory,
    new_file,
    remove_leftovers,
    write_text,
)


@pytest.mark.parametrize(
    ("environment", "root"),
    [
        ({}, "home/.cache/jaxtune"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/jaxtune"),
        ({"XDG_CACHE_HOME": "xdg", "JAXTUNE_CACHE": "own"}, "own"),
    ],
)
def test_the_cache_lies_where_the_environment_says(environment, root, monkeypatch):
    monkeypatch.setenv("HOME", "home")
    for name in ("XDG_CACHE_HOME", "JAXTUNE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(root)


def test_compiled_programs_are_moved_by_jaxs_own_variable_only(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    monkeypatch.setenv("JAXTUNE_CACHE", "own")
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        runtime.start()
        assert jax.config.values["jax_compilation_cache_dir"] == "xdg/jaxtune/xla"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_file_that_fails_half_way_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    target = tmp_path / "note.txt"
    write_text(target, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "new \ud800")
    assert target.read_text() == "old"
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "other") as staging:
        staging.write_text(str(1 / 0))
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "folder") as folder:
        (folder / "part").write_text(str(1 / 0))
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "note.txt", "old")
        with new_directory(tmp_path / "folder") as folder:
            write_text(folder / "part", "text")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"note.txt": 0o640, "folder": 0o750, "part": 0o640}


def test_parents_that_were_made_for_nothing_are_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "a" / "b" / "c") as folder:
        (folder / "part").write_text(str(1 / 0))
    assert not list(tmp_path.iterdir())


def test_an_export_is_replaced_and_what_was_not_made_there_is_kept(tmp_path):
    target, noted = tmp_path / "adapter", []
    for number, made in enumerate([[], ["weights", "sub/old"]]):
        with new_directory(target, replace=Replacement(made, noted.append)) as folder:
            write_text(folder / "weights", str(number))
            write_text(folder / "sub" / ("new" if number else "old"), "")
        if not number:
            (target / "notes.md").write_text("mine")
    assert noted == [["sub/old", "weights"], ["sub/new", "weights"]]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "adapter", "adapter-kept-1", "adapter-kept-1/notes.md", "adapter/sub", "adapter/sub/new",
        "adapter/weights",
    ]  # fmt: skip
    assert (target / "weights").read_text() == "1"


def test_a_kill_between_the_two_renamings_costs_no_export(tmp_path):
    (tmp_path / ".adapter.jaxtune-old-01").mkdir()
    (tmp_path / ".adapter.jaxtune-old-01" / "weights").write_text("old")
    (tmp_path / ".adapter.jaxtune-new-02").mkdir()
    remove_leftovers(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "weights").read_text() == "old"


def test_what_another_process_is_writing_is_no_leftover(tmp_path):
    target = tmp_path / "model"
    with new_directory(target) as staging:
        (staging / "weights").touch()
        remove_leftovers(target)
        assert (staging / "weights").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    """As in a container with a number of a user that the system does not know."""

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "JAXTUNE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert cache_root().name == f"jaxtune-{os.getuid()}"


def test_a_place_that_cannot_be_made_is_refused_before_anything_long(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path / "file")
    with pytest.raises(UserError, match="file is no folder"):
        check_writable(tmp_path / "file" / "a" / "b")
    assert main(["eval", "none", "--data", "none", "--json", str(tmp_path / "file" / "a")]) == 2
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may write anywhere
    with pytest.raises(UserError, match="may not be written to"):
        check_writable(tmp_path / "a")
