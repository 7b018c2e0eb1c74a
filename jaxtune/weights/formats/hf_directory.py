"""Weights of a Hugging Face directory: one file, or many with an index; safetensors or
PyTorch's.
"""

from collections.abc import Callable
from pathlib import Path

from jaxtune.core.errors import UserError, listed
from jaxtune.core.files import read_json, write_json
from jaxtune.weights.formats import safetensors_files, torch_files
from jaxtune.weights.tensors import Tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
_TORCH_SINGLE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def open_directory(path: Path) -> Tensors:
    """The tensors of a model directory, none of them read yet; safetensors where there are both.

    Raises:
        UserError: no weights, a shard that is missing or cut short, or an index that disagrees with
            its shards.

    """
    for index, single, open_file in (
        (INDEX, SINGLE, safetensors_files.open_file),
        (_TORCH_INDEX, _TORCH_SINGLE, torch_files.open_file),
    ):
        if (path / index).exists():
            return _open_sharded(path, index, open_file)
        if (path / single).exists():
            return open_file(path / single)
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
                f"{path / name} names {file!r}, which is not a plain file name. Do not use this "
                "model."
            )
        if not (path / file).exists():
            raise UserError(f"{path / file}, named by {name}, does not exist. Download it again.")
        if not _inside(path, path / file):
            raise UserError(
                f"{path / file}, named by {name}, leads out of the directory. Do not use this "
                "model."
            )
        found = open_file(path / file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise UserError(
                f"{path}: the tensors {listed(twice)} are in more than one file. Download it again."
            )
        if misplaced := sorted(tensor for tensor in found if where.get(tensor, file) != file):
            raise UserError(
                f"{path}: {name} places the tensors {listed(misplaced)} in other files than "
                f"{file}, which holds them."
            )
        tensors |= found
    if missing := sorted(where.keys() - tensors.keys()):
        raise UserError(
            f"{path}: {name} names tensors that its files do not hold: {listed(missing)}."
        )
    if extra := sorted(tensors.keys() - where.keys()):
        raise UserError(
            f"{path}: the files hold tensors that {name} does not name: {listed(extra)}."
        )
    return tensors


def _inside(directory: Path, file: Path) -> bool:
    """Whether a file lies where it seems to; the hub's cache keeps files as links into the
    folder of blobs beside the snapshots.
    """
    real, home = file.resolve(), directory.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    return real.is_relative_to(home) or (blobs is not None and real.is_relative_to(blobs))


def write_directory(directory: Path, tensors: Tensors, shard_bytes: int | None = None) -> None:
    """Write weights as one safetensors file, or as several with an index where they are larger
    than one shard may be.
    """
    shards: list[Tensors] = [{}]
    size = 0
    for name, tensor in tensors.items():
        more = safetensors_files.nbytes(tensor)
        if shards[-1] and size + more > (shard_bytes or SHARD_BYTES):
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += more
    if len(shards) == 1:
        safetensors_files.write_file(directory / SINGLE, shards[0])
        return
    where, total = {}, sum(safetensors_files.nbytes(tensor) for tensor in tensors.values())
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors_files.write_file(directory / name, shard)
        where |= dict.fromkeys(shard, name)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
