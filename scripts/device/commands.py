#!/usr/bin/env python
"""The commands on this machine's device, as a user gives them, from a tiny random model to a
verified export: train, kill -9, resume, export, generate, evaluate.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import findings  # noqa: E402 (the path above)

from jaxtune.tracking.metrics_log import read_metrics  # noqa: E402 (likewise)
from tests.support import tools  # noqa: E402 (likewise)

DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"
STEPS, EVERY, KILLED_AT = 30, 5, 12


def command(*arguments):
    return [sys.executable, "-m", "jaxtune", *map(str, arguments)]


def jaxtune(name, *arguments, **environment):
    """Run a command to its end; a row says how long it took, or what it said where it failed, and
    then nothing that comes after it could be told.
    """
    began = time.monotonic()
    done = subprocess.run(
        command(*arguments),
        capture_output=True, text=True, env=os.environ | environment, check=False,
    )  # fmt: skip
    print(done.stderr[-4000:], flush=True)
    failed = {} if done.returncode == 0 else {"said": done.stderr[-2000:]}
    findings.add(
        name, ok=done.returncode == 0, seconds=round(time.monotonic() - began, 1), **failed
    )
    if failed:
        sys.exit(f"{name} failed")
    return done.stdout


def training(model, data, directory):
    return [
        "train", "--model", model, "--data", data, f"run.dir={directory}",
        f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "train.batch_size=4",
        "data.max_length=128", "adapter.dropout=0.1", "optimizer.learning_rate=5e-3",
        "optimizer.warmup=5",
    ]  # fmt: skip


def killed(arguments, directory, environment):
    """Begin a run and kill it after a step; return the step that its record has last."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    )  # fmt: skip
    while process.poll() is None and last_step(directory) < KILLED_AT:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return last_step(directory)


def last_step(directory):
    return max(
        (row["step"] for row in read_metrics(directory) if row["split"] == "train"), default=0
    )


def losses(directory):
    return [row["loss"] for row in read_metrics(directory) if row["split"] == "train"]


def resumed(model, data, folder, **environment):
    """Whether a run that was killed and goes on ends as one that was not; the second's folder."""
    whole, cut = folder / "whole", folder / "cut"
    jaxtune("train", *training(model, data, whole), **environment)
    step = killed(training(model, data, cut), cut, environment)
    findings.add("kill -9", ok=KILLED_AT <= step < STEPS, step=step)
    jaxtune("resume", *training(model, data, cut), **environment)
    one, other = (
        (place / "adapter" / "adapter_model.safetensors").read_bytes() for place in (whole, cut)
    )
    return one == other and losses(whole) == losses(cut), cut


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tools.tiny_config(hidden_size=128, intermediate_size=256)
        model = tools.save_model(folder / "model", config, tools.byte_tokenizer())
        data = tools.write_rows(folder / "rows.jsonl", tools.sums(64))
        same, run = resumed(model, data, folder)
        findings.add("killed and resumed: bit-identical", ok=same, last_loss=losses(run)[-1])
        fell = losses(run)[-1] < 0.8 * losses(run)[0]
        findings.add("the loss falls", ok=fell, first=losses(run)[0], last=losses(run)[-1])
        verified = json.loads((run / "verification.json").read_text())
        findings.add("the run's export, reloaded and in PyTorch", **verified)
        jaxtune("export --to hf", "export", run, "--to", "hf", "--out", folder / "merged")
        here = json.loads(jaxtune("eval", "eval", run, "--data", data, "--json", "-"))
        there = json.loads(
            jaxtune("eval of the merged export, on the CPU, float32", "eval", folder / "merged",
                    "--data", data, "--json", "-", JAX_PLATFORMS="cpu")
        )  # fmt: skip
        findings.compare("eval: loss here and there", abs(here["loss"] / there["loss"] - 1), 2e-2)
        if not same:  # is it the kernels that add in any order?
            again, _ = resumed(model, data, folder / "deterministic", XLA_FLAGS=DETERMINISTIC)
            findings.add("the same with deterministic kernels", same=again, flags=DETERMINISTIC)
        said = jaxtune("generate", "generate", run, "--prompt", "1+2?", "--max-new-tokens", 16)
        findings.add("an answer", answer=said.strip()[:200])


if __name__ == "__main__":
    main()
