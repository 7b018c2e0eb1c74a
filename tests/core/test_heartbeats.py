"""Who is silent is named; who is busy for a moment, or has ended as it should, is not."""

from jaxtune.core import heartbeats
from jaxtune.core.heartbeats import Heartbeats, describe_death, describe_silence


class Store(dict):
    """The processes' key-value store."""

    def key_value_set(self, key, value, *, allow_overwrite):
        assert allow_overwrite
        self[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.items() if key.startswith(prefix)]


def test_a_process_that_falls_silent_is_named(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: clock[0])
    store = Store()
    main, busy, done, dead = (Heartbeats(store, number) for number in range(4))
    for second in range(30):
        clock[0] = float(second)
        main.beat()
        if second % 6 == 0:
            busy.beat()
        if second < 5:
            dead.beat()
            done.beat()
        if second == 5:
            done.end()
        main.listen()
        assert main.silent() == ([3] if second > 14 else []), second
        assert main.newly_silent() == ([3] if second == 15 else []), second


def test_it_says_how_to_go_on():
    assert describe_death([2]).startswith("process 2 is gone (killed")
    assert "processes [1, 2] are gone" in describe_death([1, 2])
    assert "Start the same command again" in describe_death([1])
    assert describe_silence([2]).startswith("process 2 has not been heard of for 10 s")
