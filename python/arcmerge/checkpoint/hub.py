"""The folder of a model: a local folder, or one that is downloaded into the cache of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from arcmerge.errors import ArcmergeError

_HUB_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)
_WANTED = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*.safetensors"]  # sub-folders and Mistral's second copy of the weights


def locate(path: str, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """Find the folder of a model, and download the model if it is not there.

    Args:
        path: a local folder, which may start with '~', or a hub name, 'owner/name' or 'name'.
        revision: branch, tag or commit on the hub, None for its main branch. A local folder has none.
        cache_dir: the folder of the hub's cache, None for its usual one.

    Raises:
        ArcmergeError: the folder, repository or revision does not exist, may not be read, or cannot be reached.
    """
    try:
        folder = Path(path).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:  # the name is too long, a parent may not be read, no such user
        cause = error.strerror if isinstance(error, OSError) else error
        raise ArcmergeError(
            f"'model' must be a folder that can be opened, got '{path:.80}' ({cause}); check its path"
        ) from error
    if is_folder:
        return folder
    if exists:
        raise ArcmergeError(f"'model' must be a folder, got the file '{path}'; give the folder that holds it")
    if path.startswith((".", "~")) or not _HUB_NAME.fullmatch(path):
        raise ArcmergeError(f"'model' must be an existing folder or a hub name, got '{path}'; check its spelling")
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

    try:
        return Path(
            snapshot_download(
                name, revision=revision, cache_dir=cache_dir, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
        )
    except HFValidationError as error:
        raise ArcmergeError(
            f"'model' must be a local folder or a hub name, got '{name}'; write it as owner/name"
        ) from error
    except GatedRepoError as error:
        raise ArcmergeError(
            f"'model' must be one that you may download, got '{name}', which is gated; accept its terms on its hub "
            "page and run 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise ArcmergeError(
            f"'model' must be a local folder or a hub repository that you may read, got '{name}'; check the name, or "
            "run 'hf auth login'"
        ) from error
    except RevisionNotFoundError as error:
        raise ArcmergeError(
            f"'revision' must be a branch, tag or commit of '{name}' on the hub, got '{revision}'; check its branches "
            "and tags"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ArcmergeError(
            f"'model' must be a local folder, complete in the hub's cache, or on a hub that can be reached, got "
            f"'{name}'; connect, unset HF_HUB_OFFLINE, or give a local folder"
        ) from error
    except Exception as error:  # the hub's HTTP library, and with it the classes of its errors, changes by version
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise ArcmergeError(
            f"'model' must be one that can be downloaded, got '{name}' ({cause}); try again, or give a local folder"
        ) from error
