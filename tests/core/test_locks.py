"""A lock has one holder, also where its file is removed and made again."""

import errno
import fcntl
import random
import threading
import time

import pytest

from jaxtune.core.locks import Lock, LockHeldError

HOLDERS, SECONDS = 4, 1.0


def contend(path, seed, counts):
    """Take and release the lock as often as possible; count who is inside at once."""
    draw, end = random.Random(seed), time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            lock = Lock(path)
        except LockHeldError:
            continue
        with counts["guard"]:
            counts["inside"] += 1
            counts["overlaps"] += counts["inside"] > 1
            counts["taken"] += 1
        time.sleep(draw.random() * 0.002)
        with counts["guard"]:
            counts["inside"] -= 1
        if draw.random() < 0.2:
            path.unlink(missing_ok=True)  # as an earlier version did
        lock.close()


def test_under_stress_it_has_one_holder(tmp_path):
    """Locks of one process conflict as those of several do: each belongs to a file that is open."""
    counts = {"guard": threading.Lock(), "inside": 0, "overlaps": 0, "taken": 0}
    threads = [
        threading.Thread(target=contend, args=(tmp_path / "lock", seed, counts))
        for seed in range(HOLDERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts["taken"] > 50
    assert counts["overlaps"] == 0


def test_a_file_system_without_locks_is_not_taken_for_sure(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = Lock(tmp_path / "other")
    assert not lock.is_sure
    lock.close()


def test_the_holder_is_named(tmp_path):
    lock = Lock(tmp_path / "lock")
    assert lock.is_sure
    with pytest.raises(LockHeldError, match=r"process \d+ on "):
        Lock(tmp_path / "lock")
    lock.close()
