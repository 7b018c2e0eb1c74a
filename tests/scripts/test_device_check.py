"""The command for the minutes in which there is a GPU: its parts end alone, nothing found is lost,
and a dry run goes through all of them.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.source_code import ROOT

FOLDER = ROOT / "scripts" / "device"
CHECK = FOLDER / "check"
# A part that keeps what it found and then does what the test says.
PROGRAM = """
import os, subprocess, sys, time
with open(os.environ["ROWS"], "a") as file:
    file.write('{{"name": "found", "ok": true}}\\n{half}')
{then}
"""
CHILD = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import parts

    yield parts
    sys.modules.pop("parts")


def a_part(parts, name, then, half="", limit=60, memory=10**10, **options):
    program = PROGRAM.format(then=then, half=half)
    return parts.Part(name, [sys.executable, "-c", program], limit, memory, **options)


def run(parts, given, tmp_path, total=120, jobs=2, least=1):
    seen = []
    records = parts.run_all(
        given, tmp_path, total=total, jobs=jobs, least=least, changed=seen.append
    )
    assert seen
    return {record["name"]: record for record in records}, seen


def test_what_raises_hangs_or_eats_memory_loses_nothing(parts, tmp_path):
    eats = "held = bytearray(600_000_000)\nfor k in range(0, len(held), 4096): held[k] = 1\n"
    given = [
        a_part(parts, "raises", "raise RuntimeError('broken')"),
        a_part(parts, "is killed", "os.kill(os.getpid(), 9)", half='{"name": "hal'),
        a_part(parts, "hangs", f"child = {CHILD}\nprint(child.pid)\ntime.sleep(600)", limit=3),
        a_part(parts, "eats", f"{eats}time.sleep(600)", memory=300_000_000),
        a_part(parts, "finds nothing", "open(os.environ['ROWS'], 'w').close()"),
        a_part(parts, "is fine", ""),
    ]
    records, _ = run(parts, given, tmp_path)
    states = {name: record["state"] for name, record in records.items()}
    assert states == {
        "raises": "raised", "is killed": "raised", "hangs": "timed out", "eats": "ate memory",
        "finds nothing": "raised", "is fine": "passed",
    }  # fmt: skip
    assert records["eats"]["seconds"] < 30  # at once, not at its limit
    kept = {name: [row["name"] for row in record["rows"]] for name, record in records.items()}
    assert kept.pop("finds nothing") == []
    assert set(map(tuple, kept.values())) == {("found",)}
    assert "RuntimeError: broken" in records["raises"]["log"]
    status = Path("/proc") / records["hangs"]["log"].strip() / "status"
    assert not status.exists() or "zombie" in status.read_text()


def test_a_wrong_result_is_a_failure(parts, tmp_path):
    wrong = 'open(os.environ["ROWS"], "a").write(\'{"name": "b", "ok": false}\\n\')'
    records, _ = run(parts, [a_part(parts, "one", wrong)], tmp_path)
    assert records["one"]["state"] == "failed"


def test_time_runs_out_and_what_waits_is_named(parts, tmp_path):
    """What runs is seen while it runs, so that a check that is killed has said what it found."""
    given = [a_part(parts, name, "time.sleep(600)", timed=True) for name in ("first", "second")]
    began = time.monotonic()
    records, seen = run(parts, given, tmp_path, total=7, least=5)
    assert time.monotonic() - began < 20
    assert [record["state"] for record in records.values()] == ["timed out", "not reached"]
    assert any(
        one["state"] == "running" and [row["name"] for row in one["rows"]] == ["found"]
        for records in seen
        for one in records
    )


def test_nothing_runs_beside_a_timed_part(parts, tmp_path):
    now = 'open(os.environ["ROWS"], "a").write(f\'{{"name": "{time.time()}"}}\\n\')'
    then = f"{now}\ntime.sleep(1)\n{now}"
    names = [("a", False), ("b", True), ("c", False), ("d", False)]
    given = [a_part(parts, name, then, timed=timed) for name, timed in names]
    records, _ = run(parts, given, tmp_path, jobs=3)
    spans = {
        name: [float(row["name"]) for row in record["rows"][1:]] for name, record in records.items()
    }
    assert spans["a"][1] < spans["b"][0] < spans["b"][1] < min(spans["c"][0], spans["d"][0])
    assert spans["c"][0] < spans["d"][1]
    assert spans["d"][0] < spans["c"][1]


def test_without_what_is_needed_the_others_are_not_begun(parts, tmp_path):
    given = [
        a_part(parts, "needed", "sys.exit(1)", needed=True, timed=True), a_part(parts, "other", "")
    ]  # fmt: skip
    records, _ = run(parts, given, tmp_path)
    assert [record["state"] for record in records.values()] == ["raised", "not reached"]


def check(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(CHECK), *map(str, arguments)],
        capture_output=True, text=True, timeout=1400, env=os.environ | environment, check=False,
    )  # fmt: skip


def test_without_a_gpu_it_says_so(tmp_path):
    done = check("--out", tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "machine: raised" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {part["state"] for part in results["parts"][1:]} == {"not reached"}
    assert "There is no GPU" in results["parts"][0]["log"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_dry_run_goes_through_every_part(tmp_path):
    done = check("--dry-run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {part["state"] for part in results["parts"]} == {"passed"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "DRY RUN" in table
    for found in ("| 8B PEFT, 2 x 96 packed", "| 64 |", "attention", "cuDNN", "kill -9"):
        assert found in table, found
    before = (ROOT / "scripts" / "bench" / "RESULTS.md").read_bytes()
    refused = check("--record", tmp_path / "out" / "results.json")
    assert refused.returncode == 1
    assert "dry run" in refused.stderr
    assert (ROOT / "scripts" / "bench" / "RESULTS.md").read_bytes() == before
