"""The export of a run's adapter: portable unless it is asked to be exact, with who reads it."""

import json

import jax
import pytest
from safetensors.numpy import load_file

from jaxtune.cli.main import main
from jaxtune.config.load import load_config
from jaxtune.core.mesh import make_mesh
from jaxtune.tracking.progress import Reporter
from jaxtune.training import setup
from jaxtune.workflows.train import run
from tests.support import tools

pytestmark = pytest.mark.usefixtures("quick_compilation")


def configuration(directory):
    raw = json.loads((directory / "adapter_config.json").read_text())
    return raw["r"], raw["lora_alpha"], raw["use_rslora"], raw["rank_pattern"]


@pytest.mark.slow
def test_a_runs_own_adapter_is_as_trained_and_its_export_is_portable(
    chat_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))
    monkeypatch.setattr("jaxtune.core.runtime.start", lambda *_: None)
    rows = tools.write_rows(tmp_path / "rows.jsonl", tools.sums(12))
    result = run(
        load_config(
            overrides=[
                f"model.source={chat_model}", f"run.dir={tmp_path / 'run'}", f"data.train={rows}",
                "data.max_length=64", "train.batch_size=4", "train.steps=2", "adapter.rank=4",
                "adapter.alpha=8", "adapter.rslora=true", "adapter.rank_pattern={q_proj: 20}",
                "adapter.targets=[q_proj, v_proj]", "optimizer.learning_rate=1e-2",
            ]
        ),
        Reporter(quiet=True),
    )  # fmt: skip
    trained = (4, 8, True, {"q_proj": 20})
    assert configuration(result.adapter) == trained
    capsys.readouterr()

    def exported(name, *options):
        path = tmp_path / f"{name}.json"
        out = ["--to", "peft", "--out", str(tmp_path / name), "--json", str(path)]
        assert main(["export", str(result.dir), *out, *options]) == 0
        readers = {entry["name"]: entry for entry in json.loads(path.read_text())["consumers"]}
        return capsys.readouterr().out, readers

    printed, readers = exported("portable")
    assert configuration(tmp_path / "portable") == (20, 20, False, {})
    assert [reader["accepted"] for reader in readers.values()] == [True, True, True]
    assert "  vLLM accepts it: with --max-lora-rank 32\n  llama.cpp accepts it\n" in printed

    printed, readers = exported("exact", "--exact")
    assert configuration(tmp_path / "exact") == trained
    own, exact = (
        load_file(path / "adapter_model.safetensors")
        for path in (result.adapter, tmp_path / "exact")
    )
    assert own.keys() == exact.keys()
    assert all((own[key] == exact[key]).all() for key in own)
    assert [readers[name]["accepted"] for name in ("PEFT", "vLLM", "llama.cpp")] == [
        True, False, False,
    ]  # fmt: skip
    assert "  vLLM does not accept it: it does not read rank_pattern" in printed

    out = str(tmp_path / "merged")
    assert main(["export", str(result.dir), "--to", "hf", "--out", out, "--exact"]) == 2
    assert "exact is for --to peft" in capsys.readouterr().err
