"""Where a model's folder is: a local path as it stands, or a hub name, downloaded into the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from arcmerge.errors import ArcmergeError

_HUB_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)
_WANTED = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*.safetensors"]  # sub-folders and Mistral's second copy of the weights


def locate(path: str, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """The folder of a model.

    path: a local folder, '~' allowed, to which `revision` means nothing; else a hub name, 'owner/name' or 'name'.
    revision: branch, tag or commit on the hub; None for its main branch.
    cache_dir: the hub's cache, None for its usual place.

    Raises ArcmergeError: no such folder, no such repository or revision, no permission, no network.
    """
    try:
        folder = Path(path).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be read; no such user
        cause = error.strerror if isinstance(error, OSError) else error
        raise ArcmergeError(f"model '{path:.80}' cannot be opened: {cause}: check its path.") from error
    if is_folder:
        return folder
    if exists:
        raise ArcmergeError(f"model '{path}' must be a folder, it is a file: give the folder that holds it.")
    if path.startswith((".", "~")) or not _HUB_NAME.fullmatch(path):
        raise ArcmergeError(f"model '{path}' is a path, and there is no such folder: check it for a slip.")
    return _download(path, revision, cache_dir)


def _download(name: str, revision: str | None, cache_dir: Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    model = f"model '{name}'"
    try:
        return Path(
            snapshot_download(
                name, revision=revision, cache_dir=cache_dir, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
        )
    except HFValidationError as error:
        raise ArcmergeError(f"{model} is neither a local folder nor a hub name: write it as owner/name.") from error
    except GatedRepoError as error:
        raise ArcmergeError(f"{model} is gated: accept its terms on its hub page and run 'hf auth login'.") from error
    except RepositoryNotFoundError as error:
        raise ArcmergeError(
            f"{model} is no local folder and no hub repository you may read: check the name, or run 'hf auth login'."
        ) from error
    except RevisionNotFoundError as error:
        raise ArcmergeError(f"{model} has no revision '{revision}' on the hub: check its branches and tags.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ArcmergeError(
            f"{model} is no local folder, the hub's cache does not hold it whole and the hub cannot be reached: "
            "connect, unset HF_HUB_OFFLINE, or give a local folder."
        ) from error
    except Exception as error:  # The hub's HTTP library, and with it the classes of its errors, changes by version.
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise ArcmergeError(f"{model} could not be downloaded ({cause}): try again, or give a local folder.") from error
