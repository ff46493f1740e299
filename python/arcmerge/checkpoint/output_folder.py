"""The output folder, which appears complete or not at all.

All files are written into a hidden folder next to it and synced; one rename then puts that folder in place, or one
exchange if an older output is there. If the work ends earlier, even by a power failure, the older output is unchanged.

A folder that exists, is empty and cannot be renamed, for example a mount point, is filled in place: files are written
into a hidden folder inside it and moved out at the end, config.json last, because without it the folder is no model.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from arcmerge.checkpoint.header import recorded_files
from arcmerge.checkpoint.layout import INDEX_NAME
from arcmerge.checkpoint.writer import require_space
from arcmerge.errors import ArcmergeError
from arcmerge.interrupts import held

# Files that mergekit writes, that training adds to them, and that hubs and people add to any folder.
_MERGEKIT_CONFIG = "mergekit_config.yml"
_MERGEKIT_SUFFIXES = {".safetensors", ".json", ".model", ".txt", ".md", ".jinja"}
_TRAINING_FILES = {"trainer_state.json", "train_results.json", "eval_results.json", "all_results.json"}
_HUB_FILES = {".gitattributes", "LICENSE", "NOTICE"}
_LOST_AND_FOUND = "lost+found"
# Files that are moved in last, config.json as the very last.
_LAST = ("config.json", INDEX_NAME)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class OutputFolder:
    """A folder to fill: write files into `path`, then call `commit` to put them at `target`.

    The constructor checks its arguments without writing to the disk. Entering the context creates `path` and removes
    what killed runs have left for this target; leaving it removes `path`, unless it was committed.

    Args:
        target: the folder that is wanted. If it exists, it must be empty or an earlier merge, which is then replaced.
            If not, its parents need not exist either.
        inputs: files and folders that the work reads. `target` must not be, contain or lie inside one of them.
        nbytes: the size of all files that will be written.

    Raises:
        ArcmergeError: an argument breaks a rule, or the disk has too little space.

    Example:
        >>> with OutputFolder(Path("merged"), inputs=[parent], nbytes=len(content)) as folder:
        ...     (folder.path / "config.json").write_bytes(content)
        ...     folder.commit()
    """

    def __init__(self, target: Path, inputs: Iterable[Path] = (), nbytes: int = 0) -> None:
        try:
            self.target = target.expanduser().resolve()
            found = self.target.exists()
        except (RuntimeError, OSError, ValueError) as error:  # no such user, a loop of links, a null character
            raise ArcmergeError(
                f"{target} must be the path of a folder, got an error ({error}); give another"
            ) from error
        if found and not self.target.is_dir():
            raise ArcmergeError(f"{self.target} must be a folder, got a file of this name; give another name")
        self._in_place = found and _must_stay(self.target)
        self._workspace = self.target if self._in_place else self.target.parent
        _check_workspace(self.target, self._workspace)
        _check_apart(self.target, inputs)
        self._check_replaceable()
        require_space(_existing(self._workspace), nbytes)
        self.path = self._hidden("partial")
        self._locked: int | None = None  # `path`, open and locked
        self._created: list[Path] = []  # parents that this run has created

    def __enter__(self) -> OutputFolder:
        try:
            self._create_workspace()
            self._remove_abandoned()
            self._create_locked()
        except BaseException as error:
            self._clear()
            self._remove_created()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with held():
            self._clear()
            self._remove_created()

    def commit(self) -> None:
        """Sync every file and put the folder at `target`. Raises ArcmergeError if that fails."""
        try:
            for file in self.path.iterdir():
                _sync(file)
            _sync(self.path)
            self._check_replaceable()
            if self._in_place:
                with held():
                    self._move_in()
            elif self.target.exists() and any(self.target.iterdir()):
                self._replace()
            else:
                self.path.rename(self.target)
            _sync(self._workspace)
            for folder in self._created:
                _sync(folder.parent)
            self._created = []
        except OSError as error:
            raise self._failure(error) from error

    def _create_workspace(self) -> None:
        for parent in reversed([one for one in (self._workspace, *self._workspace.parents) if not one.exists()]):
            with suppress(FileExistsError):
                parent.mkdir()
                self._created.append(parent)

    def _create_locked(self) -> None:
        """Create `path` and lock it.

        Another run may remove it before it is locked, as it looks abandoned, and a run that ends may remove a parent
        that it had created. Then try again.
        """
        for _ in range(100):
            with suppress(FileNotFoundError):
                self._create_workspace()
                self.path.mkdir()
                self._locked = _lock(self.path, fcntl.LOCK_EX)
                if self.path.exists():
                    return
            if self._locked is not None:
                os.close(self._locked)
                self._locked = None
        raise OSError(errno.EBUSY, "other runs remove its folders all the time")

    def _remove_created(self) -> None:
        """Remove the parents that this run has created, as far as they are empty."""
        for folder in reversed(self._created):
            with suppress(OSError):
                folder.rmdir()

    def _move_in(self) -> None:
        """Move the files one by one, config.json last; if one cannot be moved, remove them all."""
        for file in self._contents():  # left by a run that was killed here
            file.unlink()
        names = sorted((file.name for file in self.path.iterdir()), key=lambda name: (name in _LAST, name == _LAST[0]))
        try:
            for name in names:
                if name == _LAST[0]:
                    _sync(self.target)
                (self.path / name).rename(self.target / name)
        except OSError:
            for name in names:
                (self.target / name).unlink(missing_ok=True)
            raise

    def _contents(self) -> list[Path]:
        """The files in `target`, without the hidden folders of runs that fill it in place."""
        hidden = f".{self.target.name}."
        return [
            file
            for file in sorted(self.target.iterdir())
            if not (self._in_place and (file.name == _LOST_AND_FOUND or file.name.startswith(hidden)))
        ]

    def _check_replaceable(self) -> None:
        files = self._contents() if self.target.is_dir() else []
        if not files:
            return
        _check_earlier_merge(self.target, files)
        if self._in_place and any(file.name == _LAST[0] for file in files):
            raise ArcmergeError(
                f"{self.target} must be empty, because it cannot be replaced in one step (it is a mount point or the "
                "current folder, or its parent is read-only), got an earlier merge; give a folder inside it, or empty "
                "it first"
            )

    def _replace(self) -> None:
        if _exchange(self.path, self.target):
            return
        # Two renames. If the run is killed between them, the older output keeps this name, which nothing removes.
        older = self._hidden("replaced")
        self.target.rename(older)
        try:
            self.path.rename(self.target)
        except BaseException:
            older.rename(self.target)
            raise
        shutil.rmtree(older, ignore_errors=True)

    def _clear(self) -> None:
        # After an exchange, the folder of this name is the older output.
        shutil.rmtree(self.path, ignore_errors=True)
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def _hidden(self, state: str) -> Path:
        return self._workspace / f".{self.target.name}.{state}-{secrets.token_hex(4)}"

    def _remove_abandoned(self) -> None:
        """Remove the hidden folders of killed runs: a run locks its folder until it ends, so these can be locked."""
        for folder in self._workspace.glob(f".{glob.escape(self.target.name)}.partial-*"):
            with suppress(OSError):
                lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock)

    def _failure(self, error: OSError) -> ArcmergeError:
        return ArcmergeError(
            f"{self.target}: the output must be put in place, got '{error.strerror}'; "
            f"check {_existing(self._workspace)} and its disk"
        )


def _must_stay(target: Path) -> bool:
    """Whether an existing folder cannot or must not be renamed, so that its files are moved instead."""
    return target == Path.cwd() or _is_mount(target) or not os.access(target.parent, os.W_OK | os.X_OK)


def _is_mount(folder: Path) -> bool:
    if folder.is_mount():
        return True
    try:  # bind mounts of the same file system, as in containers
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    escaped = str(folder).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    return any(line.split(" ")[4] == escaped for line in mounts)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that exists."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def _check_workspace(target: Path, workspace: Path) -> None:
    existing = _existing(workspace)
    if not existing.is_dir():
        raise ArcmergeError(f"{target}: its parent {existing} must be a folder, got a file; give another folder")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise ArcmergeError(
            f"{target}: {existing} must be writable, got no permission; change its permissions or write elsewhere"
        )


def _check_earlier_merge(target: Path, files: Sequence[Path]) -> None:
    """Raises ArcmergeError unless all of `files`, the content of `target`, were written by a merge."""
    weights = [file for file in files if file.suffix == ".safetensors" and file.is_file()]
    if not weights:
        raise ArcmergeError(
            f"{target} must be empty or an earlier merge to be replaced, got a folder with '{files[0].name}' but no "
            "model; empty it or give another folder"
        )
    recorded = {file: recorded_files(file) for file in weights}
    if all(names is None for names in recorded.values()) and _is_from_mergekit(target, weights):
        known = {file.name for file in files if file.suffix in _MERGEKIT_SUFFIXES}
        known = (known - _TRAINING_FILES) | {_MERGEKIT_CONFIG}
    else:
        unknown = next((file for file, names in recorded.items() if names is None), None)
        if unknown is not None:
            raise ArcmergeError(
                f"{target} must be empty or an earlier merge to be replaced, got a folder with '{unknown.name}', which "
                "no merge wrote and which may be the only copy of a trained model; give another folder, or move this "
                "one away"
            )
        known = {file.name for file in weights}.union(*(names or () for names in recorded.values()))
    strange = next((file for file in files if file.name not in known | _HUB_FILES or not file.is_file()), None)
    if strange is not None:
        raise ArcmergeError(
            f"{target} must be empty or an earlier merge to be replaced, got a folder with '{strange.name}'; move that "
            "away or give another folder"
        )


def _is_from_mergekit(target: Path, weights: Iterable[Path]) -> bool:
    """mergekit writes its configuration after the weights; weights with a later time come from something else."""
    config = target / _MERGEKIT_CONFIG
    return config.is_file() and all(file.stat().st_mtime_ns <= config.stat().st_mtime_ns for file in weights)


def _check_apart(target: Path, inputs: Iterable[Path]) -> None:
    for given in inputs:
        source = given.expanduser().resolve()
        if source == target:
            relation = "is the input"
        elif source in target.parents:
            relation = "lies inside the input"
        elif target in source.parents:
            relation = "contains the input"
        else:
            continue
        raise ArcmergeError(
            f"{target} must be apart from all inputs, which stay as they are, got a folder that {relation} {source}; "
            "give another folder"
        )


def _lock(folder: Path, how: int) -> int | None:
    """Open and lock a folder; None if another process holds the lock and `how` does not wait, or without locks."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, how)
    except OSError:
        os.close(file)
        return None
    except BaseException:
        os.close(file)
        raise
    return file


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, with renameat2(2); False if the system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one))


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
