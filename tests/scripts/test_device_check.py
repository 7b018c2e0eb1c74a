"""The command for the minutes in which there is a GPU: its parts end alone, nothing found is lost,
and a dry run goes through all of them.
"""

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
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
def script(monkeypatch):
    """Import a file of scripts/device by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    known = set(sys.modules)

    def load(name):
        if name == "check":  # without a suffix
            spec = spec_from_loader(name, SourceFileLoader(name, str(CHECK)))
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


@pytest.fixture
def parts(script):
    return script("parts")


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


HLO = """HloModule jit_step
%gemm_body (p0: bf16[64,512], p1: bf16[256,512]) -> bf16[64,256] {
  %p0 = bf16[64,512]{1,0} parameter(0)
  %p1 = bf16[256,512]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,256]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
%thin_body (p2: bf16[64,512], p3: bf16[16,512]) -> bf16[64,16] {
  %p2 = bf16[64,512]{1,0} parameter(0)
  %p3 = bf16[16,512]{1,0} parameter(1)
  ROOT %dot.2 = bf16[64,16]{1,0} dot(%p2, %p3), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
ENTRY %main (a: bf16[64,512], w: bf16[256,512], l: bf16[48,512]) -> bf16[64,256] {
  %a = bf16[64,512]{1,0} parameter(0)
  %w = bf16[256,512]{1,0} parameter(1)
  %l = bf16[48,512]{1,0} parameter(2)
  %gemm_fusion_dot = bf16[64,256]{1,0} fusion(%a, %w), kind=kCustom, calls=%gemm_body
  %gemm_fusion_dot.1 = bf16[64,16]{1,0} fusion(%a, %l), kind=kCustom, calls=%thin_body
  %cublas.1 = (bf16[64,256]{1,0}, s8[9]{0}) custom-call(%a, %w), custom_call_target="__cublas$lt"
  %cublas.2 = (bf16[64,48]{1,0}, s8[9]{0}) custom-call(%a, %l), custom_call_target="__cublas$lt"
  %fmha.1 = bf16[2,64]{1,0} custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
  %copy.1 = bf16[64,256]{1,0} copy(%gemm_fusion_dot)
  %loop_add_fusion = bf16[64,256]{1,0} fusion(%copy.1), kind=kLoop, calls=%other
  %while.1 = (s32[]) while(%a), condition=%c, body=%b
}
"""


def test_the_kinds_of_operations(script):
    program = script("kinds").Program(HLO)
    kinds = {
        "gemm_fusion_dot": "products", "gemm_fusion_dot.1": "thin products",
        "cublas.1": "products", "cublas.2": "thin products", "fmha.1": "attention",
        "copy.1": "copies", "loop_add_fusion": "elementwise", "while.1": None,
        "nvjet_tst_128x8": "products", "cudnn_generated_fort_sdpa": "attention",
        "MemcpyD2D": "copies",
    }  # fmt: skip
    assert {name: program.kind(name, 16) for name in kinds} == kinds


def results(**changes):
    """Of a check on a device: two parts that compare, one of which is wrong, and two steps."""
    machine = [
        {"name": "machine", "device": "A GPU", "peak_flops": 1e12, "packages": {"jax": "1"}},
        {"name": "products", "flops": 8e11, "size": 8},
        {"name": "copies", "bytes_per_second": 1e12},
    ]
    compared = [
        {"name": "near", "difference": 9e-4, "limit": 1e-3, "ok": True},
        {"name": "broken", "difference": float("nan"), "limit": 1e-3, "ok": False, "said": "/x/y"},
        {"name": "tests/a.py::test_b[1]", "skipped": "needs 8 devices"},
        {"name": "tests/a.py::test_b[2]", "skipped": "needs 8 devices"},
    ]
    step = {"tokens": 100, "frozen": 10**9, "trained": 0, "memory_is_at_most": False}
    speed = {
        "8B": [step | {"name": "8B, 2 x 64", "seconds": 1.0, "memory": 10**9}],
        "8B PEFT": [step | {"name": "8B PEFT, 2 x 64", "seconds": 2.0, "memory": 4 * 10**9}],
    }
    named = {"machine": machine, "parity": compared} | {
        f"speed of {case}": rows for case, rows in speed.items()
    }
    parts = [
        {"name": name, "state": "passed", "seconds": 1.0, "rows": rows, "log": ""}
        for name, rows in named.items()
    ]
    parts.append({"name": "b", "state": "raised", "seconds": 1.0, "rows": [], "log": "/home/me"})
    known = {"date": "2026-01-01", "command": "check", "commit": "abc", "missing": []}
    return known | {"dry_run": False, "parts": parts} | changes


def test_the_table(script):
    lines = script("table").render(results()).splitlines()
    assert "| 8B, 2 x 64 | 100 | 1000.0 | 40.0% | 50.0% | 1.00 |  |" in lines
    assert "| 8B PEFT, 2 x 64 | 50 | 2000.0 | 20.0% | 25.0% | 4.00 | 2.00x, 0.25x |" in lines
    assert "| parity | 2 | broken | nan | 1e-03 |" in lines
    assert "- left out, parity: test_b: needs 8 devices" in lines
    assert any(line.startswith("- WRONG, parity: broken") for line in lines)


def test_only_a_device_is_recorded_and_without_its_paths(script, tmp_path, monkeypatch):
    check = script("check")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    place = tmp_path / "scripts" / "bench" / "RESULTS.md"
    place.parent.mkdir(parents=True)
    place.write_text("before\n")
    (tmp_path / "real").write_text(json.dumps(results()))
    check.record(tmp_path / "real")
    text = place.read_text()
    assert text.startswith("before\n\n## 2026-01-01: `check`, A GPU")
    assert "WRONG, parity: broken" in text
    assert "/x" not in text
    assert "/home/me" not in text
    (tmp_path / "dry").write_text(json.dumps(results(dry_run=True)))
    with pytest.raises(SystemExit, match="dry run"):
        check.record(tmp_path / "dry")
    assert place.read_text() == text


def test_wheels_are_unpacked_where_a_package_is_missing(script, tmp_path, monkeypatch):
    check = script("check")
    (tmp_path / "wheels.txt").write_text("# why\npytest\nnot-here==1.0\nnowhere\n")
    monkeypatch.setattr(check, "HERE", tmp_path)
    for name in ("not_here-1.0", "pytest-0.1"):
        with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
    assert check.unpack_wheels(tmp_path, tmp_path / "packages") == ["nowhere"]
    assert [path.name for path in (tmp_path / "packages").iterdir()] == ["not_here-1.0.py"]


def check(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(CHECK), *map(str, arguments)],
        capture_output=True, text=True, timeout=1400, env=os.environ | environment, check=False,
    )  # fmt: skip


def test_without_a_gpu_it_says_so(tmp_path):
    done = check("--out", tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "machine: raised" in done.stdout
    machine, *others = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    assert {part["state"] for part in others} == {"not reached"}
    assert "There is no GPU" in machine["log"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_dry_run_goes_through_every_part(tmp_path):
    done = check("--dry-run", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    assert {part["state"] for part in parts} == {"passed"}
    rows = {part["name"]: {row["name"]: row for row in part["rows"]} for part in parts}
    assert rows["commands"]["killed and resumed: bit-identical"]["ok"]
    kinds = {row.get("profile") for row in rows["speed of 8B"].values()}
    assert kinds >= {"products", "thin products", "elementwise"}
    assert {"8B PEFT, 2 x 64", "8B PEFT, 2 x 96 packed"} == rows["speed of 8B PEFT"].keys()
    assert len(rows["speed of generation PEFT"]) == 3
    assert "DRY RUN" in (tmp_path / "out" / "table.md").read_text()
    before = (ROOT / "scripts" / "bench" / "RESULTS.md").read_bytes()
    refused = check("--record", tmp_path / "out" / "results.json")
    assert refused.returncode == 1
    assert "dry run" in refused.stderr
    assert (ROOT / "scripts" / "bench" / "RESULTS.md").read_bytes() == before
