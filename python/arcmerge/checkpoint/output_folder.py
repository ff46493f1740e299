"""The output folder: it appears complete or not at all.

Everything is written into a hidden sibling, made durable, and put in place by one rename (by an exchange where an older
output stands there). Whatever ends the work earlier, even the power, leaves the older output as it was.

An empty folder that cannot be renamed, as a mount point, is filled from a hidden folder inside it, config.json last:
without that file it is no model yet.
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

from arcmerge.checkpoint.header import files_beside
from arcmerge.checkpoint.layout import INDEX_NAME
from arcmerge.checkpoint.writer import require_space
from arcmerge.errors import ArcmergeError
from arcmerge.interrupts import held

# What mergekit writes beside weights, and what training does there; hubs and people add the rest.
_MERGEKIT_CONFIG = "mergekit_config.yml"
_MERGEKIT_KINDS = {".safetensors", ".json", ".model", ".txt", ".md", ".jinja"}
_OF_TRAINING = {"trainer_state.json", "train_results.json", "eval_results.json", "all_results.json"}
_OF_HUBS = {".gitattributes", "LICENSE", "NOTICE"}
_LOST_AND_FOUND = "lost+found"
_LAST = ("config.json", INDEX_NAME)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class OutputFolder:
    """A folder to fill: write into `path`, then commit(), and `target` is there.

    target: the folder wanted. It may exist if it is empty or an earlier merge, which is then replaced; where it does
    not exist, neither need its parents.
    inputs: files and folders the work reads; target must not be, hold or lie inside one of them.
    nbytes: what will be written.

    The constructor checks all of that, without touching the disk, and raises ArcmergeError. Entering the context makes
    `path` and clears what killed runs left of this target; leaving it removes `path`, unless committed.
    """

    def __init__(self, target: Path, inputs: Iterable[Path] = (), nbytes: int = 0) -> None:
        try:
            self.target = target.expanduser().resolve()
            found = self.target.exists()
        except (RuntimeError, OSError, ValueError) as error:  # no such user, links in a circle, a null character
            raise ArcmergeError(f"{target}: is no path of a folder ({error}): give another one.") from error
        if found and not self.target.is_dir():
            raise ArcmergeError(
                f"{self.target}: the output is a folder, but a file of this name exists: give another name."
            )
        self._stays = found and _stays(self.target)
        self._room = self.target if self._stays else self.target.parent
        _check_room(self.target, self._room)
        _check_apart(self.target, inputs)
        self._check_replaceable()
        require_space(_existing(self._room), nbytes)
        self.path = self._sibling("partial")
        self._held: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> OutputFolder:
        try:
            self._make_room()
            self._remove_abandoned()
            self._make_locked()
        except BaseException as error:
            self._clear()
            self._remove_made()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with held():
            self._clear()
            self._remove_made()

    def commit(self) -> None:
        """Makes every file durable and puts the folder in place of `target`."""
        try:
            for file in self.path.iterdir():
                _sync(file)
            _sync(self.path)
            self._check_replaceable()
            if self._stays:
                with held():
                    self._move_in()
            elif self.target.exists() and any(self.target.iterdir()):
                self._replace()
            else:
                self.path.rename(self.target)
            _sync(self._room)
            for made in self._made:
                _sync(made.parent)
            self._made = []
        except OSError as error:
            raise self._failure(error) from error

    def _make_room(self) -> None:
        for parent in reversed([one for one in (self._room, *self._room.parents) if not one.exists()]):
            with suppress(FileExistsError):
                parent.mkdir()
                self._made.append(parent)

    def _make_locked(self) -> None:
        """Makes `path` and locks it. Another run may take it, not locked yet, for an abandoned one, and one that ends
        may take away a parent that it had made: then again."""
        for _ in range(100):
            with suppress(FileNotFoundError):
                self._make_room()
                self.path.mkdir()
                self._held = _lock(self.path, fcntl.LOCK_EX)
                if self.path.exists():
                    return
            if self._held is not None:
                os.close(self._held)
                self._held = None
        raise OSError(errno.EBUSY, "other runs remove its folders all the time")

    def _remove_made(self) -> None:
        """Takes away the parents that this run has made, as far as they are empty."""
        for parent in reversed(self._made):
            with suppress(OSError):
                parent.rmdir()

    def _move_in(self) -> None:
        """The files one by one, that by which a model is known last; all of them out again if one cannot be moved."""
        for file in self._contents():  # of a run that was killed here
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
        """What is in `target`, but for what runs that work inside it keep there."""
        hidden = f".{self.target.name}."
        return [
            file
            for file in sorted(self.target.iterdir())
            if not (self._stays and (file.name == _LOST_AND_FOUND or file.name.startswith(hidden)))
        ]

    def _check_replaceable(self) -> None:
        files = self._contents() if self.target.is_dir() else []
        if not files:
            return
        _check_earlier(self.target, files)
        if self._stays and any(file.name == _LAST[0] for file in files):
            raise ArcmergeError(
                f"{self.target}: cannot be replaced in one step, because it is a mount point or the current folder, or "
                "its parent is read-only, and it holds an earlier merge: give a folder inside it, or empty it first."
            )

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
        return self._room / f".{self.target.name}.{state}-{secrets.token_hex(4)}"

    def _remove_abandoned(self) -> None:
        """A run holds a lock on its folder for as long as it lives; a folder that can be locked has lost its run."""
        for folder in self._room.glob(f".{glob.escape(self.target.name)}.partial-*"):
            with suppress(OSError):
                lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock)

    def _failure(self, error: OSError) -> ArcmergeError:
        return ArcmergeError(
            f"{self.target}: cannot be put in place: {error.strerror}: check {_existing(self._room)} and its disk."
        )


def _stays(target: Path) -> bool:
    """Whether an existing folder cannot be renamed, or must not: then its files are."""
    return target == Path.cwd() or _is_mount(target) or not os.access(target.parent, os.W_OK | os.X_OK)


def _is_mount(folder: Path) -> bool:
    if folder.is_mount():
        return True
    try:  # a folder of the same file system that is mounted here, as containers do
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    escaped = str(folder).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    return any(line.split(" ")[4] == escaped for line in mounts)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that is there."""
    return next(one for one in (folder, *folder.parents) if one.exists())


def _check_room(target: Path, room: Path) -> None:
    existing = _existing(room)
    if not existing.is_dir():
        raise ArcmergeError(f"{target}: its parent {existing} must be a folder, is a file: give another folder.")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise ArcmergeError(f"{target}: {existing} must be writable: change its permissions or write elsewhere.")


def _check_earlier(target: Path, files: Sequence[Path]) -> None:
    """ArcmergeError unless merges have written all of `files`, which `target` holds."""
    rule = f"{target}: only an empty folder or an earlier merge is replaced, and"
    weights = [file for file in files if file.suffix == ".safetensors" and file.is_file()]
    if not weights:
        raise ArcmergeError(f"{rule} it holds '{files[0].name}' but no model: empty it or give another folder.")
    noted = {file: files_beside(file) for file in weights}
    if all(names is None for names in noted.values()) and _is_of_mergekit(target, weights):
        kinds = {file.name for file in files if file.suffix in _MERGEKIT_KINDS}
        known = (kinds - _OF_TRAINING) | {_MERGEKIT_CONFIG}
    else:
        unknown = next((file for file, names in noted.items() if names is None), None)
        if unknown is not None:
            raise ArcmergeError(
                f"{rule} no merge wrote its '{unknown.name}', which may be the only copy of a trained model: give "
                "another folder, or move this one away."
            )
        known = {file.name for file in weights}.union(*(names or () for names in noted.values()))
    strange = next((file for file in files if file.name not in known | _OF_HUBS or not file.is_file()), None)
    if strange is not None:
        raise ArcmergeError(f"{rule} it holds '{strange.name}': move that away or give another folder.")


def _is_of_mergekit(target: Path, weights: Iterable[Path]) -> bool:
    """mergekit writes its configuration after the weights; weights that were saved later are of something else."""
    config = target / _MERGEKIT_CONFIG
    return config.is_file() and all(file.stat().st_mtime_ns <= config.stat().st_mtime_ns for file in weights)


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


def _lock(folder: Path, how: int) -> int | None:
    """An open, locked folder; None where another process holds it and `how` does not wait, or where the file system
    has no locks."""
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
