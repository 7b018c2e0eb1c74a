"""Files that are whole or not there, and where what can be made again is kept."""

from pathlib import Path

import jax
import pytest

from jaxtune.core import runtime
from jaxtune.core.files import cache_root, new_directory, new_file, write_text


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
