"""The output folder: it appears complete or not at all.

Everything is written into a hidden sibling, made durable, and put in place by one rename (by an exchange where an older
output stands there). Whatever ends the work earlier, even the power, leaves the older output as it was.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from arcmerge.checkpoint.writer import require_space
from arcmerge.errors import ArcmergeError

_MODEL_KINDS = {".safetensors", ".json", ".model", ".txt", ".md", ".jinja"}
_MODEL_FILES = {"mergekit_config.yml", ".gitattributes", "LICENSE", "NOTICE"}

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class OutputFolder:
    """A folder to fill: write into `path`, then commit(), and `target` is there.

    target: the folder wanted. It may exist if it is empty or an earlier output, which is then replaced.
    inputs: files and folders the work reads; target must not be, hold or lie inside one of them.
    nbytes: what will be written.

    The constructor checks all of that, without touching the disk, and raises ArcmergeError. Entering the context makes
    `path` and clears what killed runs left of this target; leaving it removes `path`, unless committed.
    """

    def __init__(self, target: Path, inputs: Iterable[Path] = (), nbytes: int = 0) -> None:
        try:
            self.target = target.expanduser().resolve()
        except (RuntimeError, OSError, ValueError) as error:  # no such user, links in a circle, a null character
            raise ArcmergeError(f"{target}: is no path of a folder ({error}): give another one.") from error
        _check_parent(self.target)
        _check_apart(self.target, inputs)
        _check_replaceable(self.target)
        require_space(self.target.parent, nbytes)
        self.path = self._sibling("partial")
        self._held: int | None = None

    def __enter__(self) -> OutputFolder:
        self._remove_abandoned()
        fresh = self._sibling("new")
        try:
            fresh.mkdir()
            # Locked under a name that nobody clears, so that a run starting beside this one never sees it unlocked.
            self._held = _try_lock(fresh)
            fresh.rename(self.path)
        except BaseException as error:
            shutil.rmtree(fresh, ignore_errors=True)
            self._clear()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _uninterrupted():
            self._clear()

    def commit(self) -> None:
        """Makes every file durable and puts the folder in place of `target`."""
        try:
            for file in self.path.iterdir():
                _sync(file)
            _sync(self.path)
            if self.target.exists():
                _check_replaceable(self.target)
                self._replace()
            else:
                self.path.rename(self.target)
            _sync(self.target.parent)
        except OSError as error:
            raise self._failure(error) from error

    def _replace(self) -> None:
        if _exchange(self.path, self.target):
            return
        # Two renames, and a kill between them leaves the older output under this name, which nothing clears.
        older = self._sibling("replaced")
        self.target.rename(older)
        try:
            self.path.rename(self.target)
        except BaseException:
            older.rename(self.target)
            raise
        shutil.rmtree(older, ignore_errors=True)

    def _clear(self) -> None:
        # After an exchange it is the older output that goes by this name.
        shutil.rmtree(self.path, ignore_errors=True)
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _sibling(self, state: str) -> Path:
        return self.target.with_name(f".{self.target.name}.{state}-{secrets.token_hex(4)}")

    def _remove_abandoned(self) -> None:
        """A run holds a lock on its folder for as long as it lives; a folder that can be locked has lost its run."""
        for folder in self.target.parent.glob(f".{glob.escape(self.target.name)}.partial-*"):
            with suppress(OSError):
                lock = _try_lock(folder)
                if lock is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock)

    def _failure(self, error: OSError) -> ArcmergeError:
        return ArcmergeError(
            f"{self.target}: cannot be put in place: {error.strerror}: check the folder that holds it."
        )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets an interrupt wait until the block is done. Only the main thread is ever interrupted."""
    held: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGINT, signal.SIGTERM):
            before[each] = signal.signal(each, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)
    for number in held:
        signal.raise_signal(number)


def _check_parent(target: Path) -> None:
    parent = target.parent
    if not parent.is_dir():
        raise ArcmergeError(f"{target}: the folder that shall hold it must exist: create {parent} first.")
    if not os.access(parent, os.R_OK | os.W_OK | os.X_OK):
        raise ArcmergeError(f"{target}: {parent} must be writable: change its permissions or write elsewhere.")


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if target == Path.cwd():
        raise ArcmergeError(
            f"{target}: is the current folder, which cannot be replaced under you: give a folder in it."
        )
    if not target.is_dir():
        raise ArcmergeError(f"{target}: the output is a folder, but a file of this name exists: give another name.")
    if target.is_mount():
        raise ArcmergeError(f"{target}: is a mount point, which cannot be replaced: give a folder inside it.")
    files = sorted(target.iterdir())
    strange = next((file for file in files if not _is_model_file(file)), None)
    if strange is not None:
        raise ArcmergeError(
            f"{target}: only an empty folder or an earlier output is replaced, and it holds '{strange.name}': "
            "move that away or give another folder."
        )
    names = {file.name for file in files}
    if files and not ("config.json" in names and any(file.suffix == ".safetensors" for file in files)):
        raise ArcmergeError(
            f"{target}: only an empty folder or an earlier output is replaced, and it holds {len(files)} files but no "
            "model: empty it or give another folder."
        )


def _is_model_file(file: Path) -> bool:
    return file.is_file() and (file.suffix in _MODEL_KINDS or file.name in _MODEL_FILES)


def _check_apart(target: Path, inputs: Iterable[Path]) -> None:
    for given in inputs:
        source = given.expanduser().resolve()
        if source == target:
            relation = "is an input"
        elif source in target.parents:
            relation = "lies inside the input"
        elif target in source.parents:
            relation = "holds the input"
        else:
            continue
        raise ArcmergeError(
            f"{target}: {relation} {source} of this merge, which must stay as it is: give another folder."
        )


def _try_lock(folder: Path) -> int | None:
    """An open, locked folder; None where another process holds it or the file system has no locks."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step: man 2 renameat2. False where the system cannot."""
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
