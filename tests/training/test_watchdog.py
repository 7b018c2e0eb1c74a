"""A step that hangs is noticed, and ends the run; what takes long for another reason does not."""

import subprocess
import sys
import threading
import time

from jaxtune.training.watchdog import Watchdog


def test_a_step_that_hangs_is_noticed_and_others_are_not():
    calls, expired = [], threading.Event()

    def expire(seconds, doing):
        calls.append((seconds, doing))
        expired.set()

    with Watchdog(0.5, expire) as watchdog:
        for step in range(4):
            time.sleep(0.2)
            watchdog.alive(f"step {step}")
        watchdog.rest()
        assert not expired.wait(1.0)
        watchdog.alive("step 5")
        assert expired.wait(5.0)
    assert calls == [(0.5, "step 5")]
    with Watchdog(0.2, expire):
        pass
    time.sleep(0.5)
    assert len(calls) == 1


def test_a_hung_run_ends_though_nobody_reads_its_stderr():
    code = (
        "import time\n"
        "from jaxtune.training.watchdog import Watchdog\n"
        "with Watchdog(0.2):\n"
        "    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert child.stderr is not None
    child.stderr.close()
    assert child.wait(timeout=50) == 1
