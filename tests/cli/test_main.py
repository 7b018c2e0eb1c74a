"""How the program begins."""

import os
import sys

import pytest

from jaxtune.cli import main as program


@pytest.fixture
def begun(monkeypatch):
    """The calls of `execve`; it ends the program, as the real one does."""
    calls = []

    def execve(path, arguments, environment):
        calls.append((path, arguments, environment["GLIBC_TUNABLES"]))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["jaxtune", "generate", "nowhere", "--prompt", "a"])
    monkeypatch.setattr(
        sys,
        "orig_argv",
        ["python", "-X", "dev", "/bin/jaxtune", "generate", "nowhere", "--prompt", "a"],
    )
    return calls


def kernel(monkeypatch, tmp_path, text):
    pages = tmp_path / "enabled"
    pages.write_text(text)
    monkeypatch.setattr(program, "Path", lambda _: pages)


def test_the_program_begins_anew_with_huge_pages(begun, monkeypatch, tmp_path):
    kernel(monkeypatch, tmp_path, "always [madvise] never\n")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    with pytest.raises(SystemExit):
        program.main()
    arguments = [
        sys.executable,
        "-X",
        "dev",
        "/bin/jaxtune",
        "generate",
        "nowhere",
        "--prompt",
        "a",
    ]
    assert begun == [(sys.executable, arguments, "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1")]


@pytest.mark.parametrize(
    ("text", "tunables"),
    [
        ("always [madvise] never", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", ""),
        ("always madvise [never]", ""),
    ],
)
def test_it_does_not_where_that_is_settled(text, tunables, begun, monkeypatch, tmp_path):
    kernel(monkeypatch, tmp_path, text)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert program.main() == 2
    assert not begun


def test_a_call_from_python_does_not(begun, monkeypatch, tmp_path):
    kernel(monkeypatch, tmp_path, "always [madvise] never")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert program.main(["generate", "nowhere", "--prompt", "a"]) == 2
    assert not begun
