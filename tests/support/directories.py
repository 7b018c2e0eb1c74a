"""What a model directory holds and computes."""

import json

import numpy as np
from safetensors.numpy import load_file

from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve

IDS = np.random.default_rng(0).integers(0, 256, (2, 24))


def tensors_of(directory):
    """Return the tensors of all safetensors files of a directory by name."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_identical(before, after):
    """Assert that the tensors of two directories are the same to the byte."""
    before, after = tensors_of(before), tensors_of(after)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert value.tobytes() == after[name].tobytes(), name


def logits(path, mesh):
    """Return the logits of `IDS` by the model at `path`."""
    return np.asarray(load_model(resolve(str(path)), mesh)(IDS))


def json_or_text(path):
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()
