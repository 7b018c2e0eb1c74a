"""The hub: download a model and upload one; its errors become messages that say what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxtune.core.errors import UserError
from jaxtune.core.files import check_inside

_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
_WEIGHTS = (["*.safetensors"], ["pytorch_model*.bin"], ["consolidated.*.pth"])


def download_model(name: str, revision: str | None = None) -> Path:
    """Download a model into the hub's cache and return its directory; of several kinds of weights
    only the first of _WEIGHTS is downloaded.

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
        top_level = [Path(file) for file in files if "/" not in file]
        present = [kind for kind in _WEIGHTS if any(file.match(kind[0]) for file in top_level)]
        weights = [*present, _WEIGHTS[0]][0]
        directory = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*_FILES, *weights],
            ignore_patterns=["*/*"],  # folders may hold the same model in other formats
            local_files_only=local,
        )
        return Path(directory)


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

    for entry in directory.rglob("*"):
        check_inside(directory, entry)
    with _errors_explained(name, None):
        api = HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
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
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise UserError(
                f"{name}: the hub refuses this token ({status}). Run 'hf auth login' with a token "
                "that may write there."
            ) from None
        raise _unreachable(name, error) from None
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise _unreachable(name, error) from None


def _unreachable(name: str, error: Exception) -> UserError:
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return UserError(
        f"{name} is not a path here, and the hub cannot be reached{offline}: "
        f"{str(error).partition(chr(10))[0]}"
    )
