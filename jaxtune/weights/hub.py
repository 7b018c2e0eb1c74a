"""The hub: download a model and upload one; its errors become messages that say what to do."""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxtune.core.errors import UserError
from jaxtune.core.files import check_inside, read_json
from jaxtune.weights.tokenizer_files import TEMPLATES, TOKENIZER_FILES

_FILES = [
    "config.json", "generation_config.json", "params.json",
    *TOKENIZER_FILES, f"{TEMPLATES}/*.jinja",
]  # fmt: skip
# Weights of one kind, the index of several files first; of several kinds the first is read.
_WEIGHTS: tuple[tuple[str | None, str], ...] = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    (None, "consolidated.*.pth"),
)


def download_model(name: str, revision: str | None = None) -> Path:
    """Download a model into the hub's cache and return its directory: only the files that are read,
    and of several kinds of weights only the first of _WEIGHTS.

    Args:
        name: organization/model.
        revision: a branch, a tag or a commit; the main branch by default.

    Raises:
        UserError: the model does not exist or is gated, or the hub cannot be reached and the cache
            does not have it.

    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    with _errors_explained(name, revision):
        local = is_offline_mode()
        try:
            files = [] if local else HfApi().list_repo_files(name, revision=revision)
        except HfHubHTTPError:
            raise
        except HTTPError:  # without a connection the cache has to do
            files, local = [], True
        directory = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*_FILES, *_weights(name, revision, files)],
            local_files_only=local,
        )
        return Path(directory)


def _weights(name: str, revision: str | None, files: Sequence[str]) -> list[str]:
    """Return the files of the weights that are read; a repository may hold them several times, in
    other formats, in folders or under other names.
    """
    from huggingface_hub import hf_hub_download

    for index, single in _WEIGHTS:
        if index is not None and index in files:
            raw = read_json(Path(hf_hub_download(name, index, revision=revision)))
            where = raw.get("weight_map") if isinstance(raw, dict) else None
            shards = where.values() if isinstance(where, dict) else []
            return [index, *{str(shard) for shard in shards}]
        if fnmatch.filter(files, single):
            return [single]
    return []


def download_file(name: str, revision: str, path: str) -> Path:
    """Download one file of a model into the hub's cache and return its path; an empty revision is
    the main branch.

    Raises:
        UserError: as `download_model`.

    """
    from huggingface_hub import hf_hub_download

    with _errors_explained(name, revision or None):
        return Path(hf_hub_download(name, path, revision=revision or None))


def push(directory: Path, name: str) -> str:
    """Upload a directory to a repository on the hub, which is created as private where there is
    none, and return its address.

    Raises:
        UserError: there is no token, it may not write there, or the hub cannot be reached.

    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    for entry in directory.rglob("*"):
        check_inside(directory, entry)
    with _errors_explained(name, None):
        api = HfApi()
        try:
            address = api.create_repo(name, private=True)
        except HfHubHTTPError as error:  # it may be there, or this token may only write to it
            try:
                api.repo_info(name)
            except HfHubHTTPError:
                raise error from None
            address = f"{api.endpoint}/{name}"
        api.upload_folder(repo_id=name, folder_path=directory, commit_message="Upload from jaxtune")
        return str(address)


@contextmanager
def _errors_explained(name: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{name} is gated. Accept its license on its hub page, then run 'hf auth login' or set "
            "HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a path here nor a model on the hub. For a private model, run "
            "'hf auth login'."
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{name} has no revision {revision!r} on the hub. Give one of its branches, tags or "
            "commits."
        ) from None
    except HFValidationError as error:
        raise UserError(f"{name} is not the name of a repository: {error}") from None
    except LocalTokenNotFoundError:
        raise UserError(
            f"{name}: the hub requires a token. Run 'hf auth login' or set HF_TOKEN."
        ) from None
    except HfHubHTTPError as error:
        if (response := error.response) is None:
            raise _unreachable(name, error) from None
        status, reason = response.status_code, error.server_message or response.reason_phrase
        reason = " ".join(reason.split())[:300]
        if status in (401, 403):
            raise UserError(
                f"{name}: the hub refuses this token ({status}: {reason}). Run 'hf auth login' "
                "with a token that may write there."
            ) from None
        raise UserError(f"{name}: the hub refuses this ({status}: {reason}).") from None
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise _unreachable(name, error) from None


def _unreachable(name: str, error: Exception) -> UserError:
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return UserError(
        f"{name} is not a path here, and the hub cannot be reached{offline}: "
        f"{str(error).partition(chr(10))[0]}"
    )
