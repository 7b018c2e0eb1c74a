"""The hub: fetching a model, and giving one to it; what goes wrong there says how to mend it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxtune.core.errors import UserError

_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
_WEIGHTS = (["*.safetensors"], ["pytorch_model*.bin"], ["consolidated.*.pth"])


def download(name: str, revision: str | None = None) -> Path:
    """The directory of a model of the hub, fetched into its cache; of the kinds of weights that are
    there the first we would read.

    Args:
        name: organization/model.
        revision: a branch, a tag or a commit; the main branch by default.

    Raises:
        UserError: it is not there, is gated, or the hub cannot be reached and the cache does not
            hold it.

    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    with _explained(name, revision):
        wanted, local = _WEIGHTS[0], is_offline_mode()
        try:
            files = [] if local else HfApi().list_repo_files(name, revision=revision)
        except HfHubHTTPError:
            raise
        except HTTPError:  # no connection: what the cache has will do
            files, local = [], True
        wanted = next(
            (
                kind
                for kind in _WEIGHTS
                if any(Path(file).match(kind[0]) and "/" not in file for file in files)
            ),
            wanted,
        )
        ignored = ["*/*"]  # a repository may hold the same model in other formats below
        patterns = [*_FILES, *wanted]
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=ignored,
                local_files_only=local,
            )
        )


def file(name: str, revision: str, path: str) -> Path:
    """One file of a model of the hub, fetched into its cache; the main branch's where the revision
    is empty.

    Raises:
        UserError: as `download`.

    """
    from huggingface_hub import hf_hub_download

    with _explained(name, revision or None):
        return Path(hf_hub_download(name, path, revision=revision or None))


def push(directory: Path, name: str) -> str:
    """Upload a directory to a repository of the hub, made private where there is none; its address.

    Raises:
        UserError: no token, no right to write there, or the hub cannot be reached.

    """
    from huggingface_hub import HfApi

    with _explained(name, None):
        api = HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message="Upload from jaxtune")
        return str(address)


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
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
            f"{name} is gated. Accept its license on its hub page, then run 'hf auth login' or "
            "set HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a path here nor a model on the hub. For a private one, run 'hf "
            "auth login'."
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{name} has no revision {revision!r} on the hub. Give a branch, a tag or a commit of "
            "it."
        ) from None
    except HFValidationError as error:
        raise UserError(f"{name} is no name of a repository: {error}") from None
    except LocalTokenNotFoundError:
        raise UserError(
            f"{name}: the hub wants a token. Run 'hf auth login' or set HF_TOKEN."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise UserError(
                f"{name}: the hub refuses this token ({status}). Run 'hf auth login' with one "
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
