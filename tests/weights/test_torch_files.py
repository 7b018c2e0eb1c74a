"""PyTorch's own files: one, sharded, of the old format; never a pickle with code."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jaxtune.core.errors import UserError
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import tools

IDS = np.random.default_rng(0).integers(0, 256, (2, 12))


@pytest.fixture
def bare(chat_model, tmp_path):
    """`(directory without weights, the weights)`."""
    directory = shutil.copytree(chat_model, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    return directory, tensors


def assert_loads(directory, mesh):
    ours = np.asarray(load_model(resolve(str(directory)), mesh)(IDS))
    np.testing.assert_allclose(
        ours, tools.torch_logits(tools.random_model(tools.tiny_config()), IDS), atol=1e-4
    )


@pytest.mark.parametrize("form", ["one", "sharded", "old"])
def test_every_form_gives_the_same_logits(form, bare, one_device):
    directory, tensors = bare
    if form == "sharded":
        names = sorted(tensors)
        parts = {
            f"pytorch_model-{number:05}-of-00003.bin": names[number - 1 :: 3]
            for number in (1, 2, 3)
        }
        for file, chosen in parts.items():
            torch.save({name: tensors[name] for name in chosen}, directory / file)
        where = {name: file for file, chosen in parts.items() for name in chosen}
        (directory / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where})
        )
    else:
        torch.save(
            tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=form == "one"
        )
    assert_loads(directory, one_device)


def test_mixed_dtypes_keep_their_values(bare, one_device):
    directory, tensors = bare
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)
    torch.save(tensors, directory / "pytorch_model.bin")
    found = resolve(str(directory)).tensors()[name]
    assert found.dtype.name == "bfloat16"
    np.testing.assert_array_equal(found.all().astype(np.float32), tensors[name].float().numpy())


class Dangerous:
    def __reduce__(self):
        return os.system, ("touch /tmp/jaxtune-was-here",)


def test_a_pickle_with_code_is_refused_and_not_run(bare):
    directory, tensors = bare
    torch.save(tensors | {"x": Dangerous()}, directory / "pytorch_model.bin")
    with pytest.raises(
        UserError, match="holds more than tensors, which could run code and is not loaded"
    ):
        resolve(str(directory)).tensors()
    assert not os.path.exists("/tmp/jaxtune-was-here")


def test_a_file_cut_short_and_one_that_is_no_state_are_one_clear_error(bare):
    directory, tensors = bare
    path = directory / "pytorch_model.bin"
    torch.save(tensors, path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"pytorch_model\.bin is not a whole file of PyTorch"):
            resolve(str(directory)).tensors()
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="does not hold tensors by name"):
        resolve(str(directory)).tensors()
    torch.save({"model.norm.weight": torch.zeros(4, dtype=torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match=r"has dtype torch\.float8_e4m3fn"):
        resolve(str(directory)).tensors()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_link_out_of_the_directory_is_refused(file, bare, tmp_path):
    directory, tensors = bare
    torch.save(tensors, tmp_path / "elsewhere")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.bin")}
    (directory / f"{file}.index.json").write_text(json.dumps(index))
    (directory / "part.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of"):
        resolve(str(directory)).tensors()
