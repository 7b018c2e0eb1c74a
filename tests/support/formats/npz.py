"""A format in one file: NumPy's `.npz` beside `config.json`. Nothing else knows of it."""

from functools import partial

import numpy as np

from jaxtune.weights.formats.format import DirectoryFormat, ModelDirectory
from jaxtune.weights.tensors import LazyTensor

WEIGHTS = "model.npz"


class NpzDirectory(ModelDirectory):
    def tensors(self):
        arrays = np.load(self.path / WEIGHTS)
        return {
            name: LazyTensor(arrays[name].shape, arrays[name].dtype, partial(_read, arrays, name))
            for name in arrays.files
        }


def _read(arrays, name, index):
    return arrays[name][index]


class NpzFormat(DirectoryFormat):
    name = "npz"
    description = "A model as NumPy arrays."
    needs = f"a directory with config.json and {WEIGHTS}"
    dtypes = ("float32", "float16")

    def recognizes(self, path):
        return (path / "config.json").exists() and (path / WEIGHTS).exists()

    def open(self, path, name):
        return NpzDirectory(name, path)

    def write_weights(self, directory, tensors):
        np.savez(directory / WEIGHTS, **{name: tensor.all() for name, tensor in tensors.items()})


FORMAT = NpzFormat()
