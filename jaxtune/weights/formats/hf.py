"""Hugging Face's format: `config.json` and the weights in one file, or in many with an index;
safetensors, or for reading PyTorch's files.
"""

from collections.abc import Callable
from pathlib import Path

from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import check_inside, read_json, write_json
from jaxtune.weights import safetensors_files, torch_files
from jaxtune.weights.formats.format import DirectoryFormat, ModelDirectory
from jaxtune.weights.source import Source
from jaxtune.weights.tensors import Tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
_TORCH_SINGLE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class HuggingFaceDirectory(ModelDirectory):
    """A directory in Hugging Face's format."""

    def tensors(self) -> Tensors:
        """See Source."""
        return open_weights(self.path)

    def pretrained_arguments(self) -> dict[str, str] | None:
        """See Source."""
        return {"pretrained_model_name_or_path": str(self.path)}


class HuggingFaceFormat(DirectoryFormat):
    """What transformers' `save_pretrained` writes, with safetensors."""

    name = "hf"
    description = "A model in Hugging Face's format."
    needs = "a directory with config.json"
    is_fallback = True
    read_by_transformers = True

    def recognizes(self, path: Path) -> bool:
        """See ModelFormat."""
        return (path / "config.json").exists()

    def open(self, path: Path, name: str) -> Source:
        """See ModelFormat."""
        return HuggingFaceDirectory(name, path)

    def write_weights(self, directory: Path, tensors: Tensors) -> None:
        """See DirectoryFormat."""
        write_weights(directory, tensors)

    def usage(self, source: Source) -> str:
        """See Format."""
        return """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")"""


FORMAT = HuggingFaceFormat()


def open_weights(path: Path) -> Tensors:
    """Return the tensors of a model directory, unread; safetensors take precedence over PyTorch's
    files.

    Raises:
        UserError: the directory has no weights, a shard is missing or truncated, or an index
            disagrees with its shards.

    """
    for index, single, open_file in (
        (INDEX, SINGLE, safetensors_files.open_file),
        (_TORCH_INDEX, _TORCH_SINGLE, torch_files.open_file),
    ):
        if (path / index).exists():
            return _open_sharded(path, index, open_file)
        if (path / single).exists():
            return open_file(check_inside(path, path / single))
    raise UserError(
        f"{path} holds no weights: there is no {SINGLE}, {INDEX}, {_TORCH_SINGLE} or "
        f"{_TORCH_INDEX}."
    )


def _open_sharded(path: Path, name: str, open_file: Callable[[Path], Tensors]) -> Tensors:
    index = read_json(path / name)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{path / name} has no weight_map from names to files. Download it again.")
    tensors: Tensors = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise UserError(
                f"{path / name} names {file!r}, which is not a plain file name. "
                "Do not use this model."
            )
        if not (path / file).exists():
            raise UserError(f"{path / file}, named by {name}, does not exist. Download it again.")
        shard = open_file(check_inside(path, path / file))
        if twice := sorted(shard.keys() & tensors.keys()):
            raise UserError(
                f"{path}: the tensors {listed(twice)} are in more than one file. Download it again."
            )
        if misplaced := sorted(tensor for tensor in shard if where.get(tensor, file) != file):
            raise UserError(
                f"{path}: {name} places the tensors {listed(misplaced)} in files other than "
                f"{file}, which holds them. Download the model again."
            )
        tensors |= shard
    if missing := sorted(where.keys() - tensors.keys()):
        raise UserError(
            f"{path}: {name} names tensors that its files do not hold: {listed(missing)}. "
            "Download the model again."
        )
    if extra := sorted(tensors.keys() - where.keys()):
        raise UserError(
            f"{path}: the files hold tensors that {name} does not name: {listed(extra)}. "
            "Download the model again."
        )
    return tensors


def write_weights(directory: Path, tensors: Tensors, shard_bytes: int | None = None) -> None:
    """Write weights as one safetensors file, or with an index as several of at most `shard_bytes`
    each (SHARD_BYTES by default); a larger tensor has a shard of its own.
    """
    shards: list[Tensors] = [{}]
    size = 0
    for name, tensor in tensors.items():
        more = tensor.nbytes
        if shards[-1] and size + more > (shard_bytes or SHARD_BYTES):
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += more
    if len(shards) == 1:
        safetensors_files.write_file(directory / SINGLE, shards[0])
        return
    where, total = {}, sum(tensor.nbytes for tensor in tensors.values())
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors_files.write_file(directory / name, shard)
        where |= dict.fromkeys(shard, name)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
