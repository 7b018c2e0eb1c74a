"""The registry of formats: a new one is one file, and what it writes is verified like any other."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxtune
from jaxtune.cli.main import main
from jaxtune.core.errors import RunError, UserError
from jaxtune.weights import formats
from jaxtune.weights.formats import registry
from jaxtune.weights.formats.format import ModelFormat
from jaxtune.weights.source import resolve
from tests.support import peft_side, tools
from tests.support.directories import assert_identical, logits

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOLDER = Path(tools.__file__).parent / "formats"
MODULE = f"{formats.__name__}.npz"


@pytest.fixture
def npz(monkeypatch):
    """The package of formats with the file npz.py in it."""
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(FOLDER)])
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))
    yield
    sys.modules.pop(MODULE, None)
    if hasattr(formats, "npz"):
        del formats.npz


def test_a_file_in_the_folder_is_a_format(npz, chat_model, tmp_path, one_device, capsys):
    for command in ("convert", "export"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "npz" in capsys.readouterr().out
    path = jaxtune.convert(str(chat_model), tmp_path / "npz", to="npz")
    assert not list(path.glob("*.safetensors"))
    np.testing.assert_array_equal(logits(path, one_device), logits(chat_model, one_device))
    assert resolve(str(path)).tokenizer()("a b")["input_ids"]
    assert "A model as NumPy arrays." in (path / "README.md").read_text()
    assert_identical(chat_model, jaxtune.convert(str(path), tmp_path / "hf", to="hf"))


def test_a_new_format_rounds_and_merges_as_others_do(npz, chat_model, tmp_path, one_device):
    reference = peft_side.lora(tools.random_model(tools.tiny_config()), b_std=0.05)
    reference.save_pretrained(tmp_path / "adapter")
    options = {"dtype": "float16", "adapter": str(tmp_path / "adapter")}
    jaxtune.convert(str(chat_model), tmp_path / "npz", to="npz", **options)
    jaxtune.convert(str(chat_model), tmp_path / "hf", to="hf", **options)
    ours, theirs = (resolve(str(tmp_path / name)).tensors() for name in ("npz", "hf"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == np.float16
        np.testing.assert_array_equal(ours[name].all(), tensor.all())
    assert json.loads((tmp_path / "npz" / "config.json").read_text())["dtype"] == "float16"
    with pytest.raises(UserError, match="'q8_0' is not supported for npz; supported are float32"):
        jaxtune.convert(str(chat_model), tmp_path / "x", to="npz", dtype="q8_0")


def test_a_run_is_exported_in_a_new_format(npz, chat_model, tmp_path, one_device):
    run = jaxtune.train(
        {
            "model": {"source": str(chat_model)},
            "adapter": {"rank": 2},
            "data": {
                "train": str(tools.write_rows(tmp_path / "rows.jsonl", tools.sums(8))),
                "max_length": 64,
            },
            "train": {"steps": 1, "batch_size": 8},
            "run": {"dir": str(tmp_path / "run")},
        },
        quiet=True,
    )
    path = jaxtune.export(run.dir, to="npz", out=tmp_path / "npz")
    merged = jaxtune.export(run.dir, to="hf", out=tmp_path / "hf")
    np.testing.assert_array_equal(logits(path, one_device), logits(merged, one_device))
    assert main(["export", str(run.dir), "--to", "npz", "--out", str(tmp_path / "again")]) == 0


def test_one_wrong_number_is_refused(npz, chat_model, tmp_path, monkeypatch):
    write_weights = type(registry.get_model_format("npz")).write_weights

    def wrong(self, directory, tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        array = np.array(tensors[name].all())
        array[3, 5] += 1e-3
        changed = type(tensors[name])(array.shape, array.dtype, lambda index: array[index])
        write_weights(self, directory, {**tensors, name: changed})

    monkeypatch.setattr(type(registry.get_model_format("npz")), "write_weights", wrong)
    with pytest.raises(
        RunError, match=r"model\.layers\.1\.mlp\.up_proj\.weight are not what was to be written"
    ):
        jaxtune.convert(str(chat_model), tmp_path / "npz", to="npz")
    assert not list(tmp_path.iterdir())


def test_a_format_is_registered_from_outside(npz, monkeypatch, chat_model, tmp_path):
    outside = type("Outside", (type(registry.get_model_format("npz")),), {"name": "arrays"})()
    with pytest.raises(UserError, match="'arrays' is not supported"):
        registry.get_format("arrays")
    registry.register(outside)
    assert "arrays" in registry.model_format_names()
    jaxtune.convert(str(chat_model), tmp_path / "out", to="arrays")


def test_an_unknown_format_is_an_error_that_lists_the_names(chat_model, tmp_path, capsys):
    out = str(tmp_path / "out")
    for arguments in (
        ["convert", str(chat_model), out, "--to", "onnx"],
        ["export", str(tmp_path), "--out", out, "--to", "onnx"],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "format 'onnx' is not supported; supported are gguf, hf, meta, orbax" in error
    with pytest.raises(UserError, match=r"'pefd' is not supported.*Did you mean 'peft'\?"):
        jaxtune.export(tmp_path, to="pefd", out=out)
    with pytest.raises(UserError, match="'peft' is not supported"):
        jaxtune.convert(str(chat_model), out, to="peft")


def test_formats_are_named_as_their_modules_and_say_what_they_read():
    assert registry.format_names() == ["gguf", "hf", "meta", "orbax", "peft"]
    for name in registry.format_names():
        known = registry.get_format(name)
        assert known.name == name
        assert known.keeps_adapter != isinstance(known, ModelFormat)


def test_a_path_is_opened_by_the_format_that_knows_it_best(chat_model, tmp_path):
    def format_name(path):
        return registry.find_format(path).name

    mixed = shutil.copytree(chat_model, tmp_path / "mixed")
    (mixed / "params.json").write_text("{}")
    assert format_name(mixed) == "hf"
    (mixed / "orbax").mkdir()
    assert format_name(mixed) == "orbax"
    (mixed / "config.json").unlink()
    assert format_name(mixed) == "meta"
    (tmp_path / "model.GGUF").touch()
    assert format_name(tmp_path / "model.GGUF") == "gguf"
    with pytest.raises(UserError, match=r"a \.gguf file, a directory with config\.json, .*hub id"):
        format_name(tmp_path)
