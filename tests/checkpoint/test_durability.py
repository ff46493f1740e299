"""The order of syncs and renames: an output that is in place after a power failure has all of its bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import arcmerge
from arcmerge.checkpoint import output_folder
from arcmerge.checkpoint.output_folder import OutputFolder
from sweeps import recipe


class Disk:
    """What a disk that loses everything unsynced would have, noted at each sync and each rename."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[int, tuple[int, int]] = {}  # by inode: the time of the last change and the size, when synced
        self.moves: list[tuple[Path, list[str]]] = []  # each folder or file that got a name, and what it lacked
        self.unsynced: set[Path] = set()  # folders whose entries have changed since
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._syncing(getattr(os, name)))
        rename = Path.rename

        def renaming(path: Path, target: Path) -> Path:
            self._note_move(path, target)
            return rename(path, target)

        exchange = output_folder._exchange

        def exchanging(one: Path, other: Path) -> bool:
            self._note_move(one, other)
            return exchange(one, other)

        monkeypatch.setattr(Path, "rename", renaming)
        monkeypatch.setattr(output_folder, "_exchange", exchanging)

    def _syncing(self, stock: Callable[[int], None]) -> Callable[[int], None]:
        def sync(file: int) -> None:
            stock(file)
            found = os.fstat(file)
            self.synced[found.st_ino] = found.st_mtime_ns, found.st_size
            self.unsynced -= {path for path in self.unsynced if path.exists() and path.stat().st_ino == found.st_ino}

        return sync

    def _note_move(self, path: Path, target: Path) -> None:
        members = [path, *path.iterdir()] if path.is_dir() else [path]
        self.moves.append((target, [one.name for one in members if not self.is_synced(one)]))
        self.unsynced |= {path.parent, target.parent}

    def is_synced(self, path: Path) -> bool:
        """Whether a file or folder has not changed since it was synced."""
        found = path.stat()
        return self.synced.get(found.st_ino) == (found.st_mtime_ns, found.st_size)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_merge_is_synced_before_it_is_named_and_its_name_after(models: Path, tmp_path: Path, disk: Disk) -> None:
    out = tmp_path / "new" / "out"
    arcmerge.merge(recipe(models), out, device="cpu")
    assert disk.moves == [(out, [])]
    assert disk.is_synced(out.parent)
    assert not disk.unsynced
    # The parent is new, so its own name must be synced too.
    assert disk.is_synced(tmp_path)


def test_an_older_output_is_exchanged_for_one_that_is_synced(models: Path, tmp_path: Path, disk: Disk) -> None:
    for t in (0.3, 0.6):
        arcmerge.merge(recipe(models, t), tmp_path / "out", device="cpu")
    assert disk.moves == [(tmp_path / "out", [])] * 2
    assert not disk.unsynced


def test_without_an_exchange_the_new_output_is_synced_before_the_older_one_goes(
    models: Path, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    arcmerge.merge(recipe(models), tmp_path / "out", device="cpu")
    monkeypatch.setattr(output_folder, "_exchange", lambda one, other: False)
    arcmerge.merge(recipe(models, 0.6), tmp_path / "out", device="cpu")
    *_, older, newer = disk.moves
    assert older[0].name.startswith(".out.replaced-")
    assert newer == (tmp_path / "out", [])
    assert not disk.unsynced


def test_in_place_all_other_files_are_named_for_good_before_config_json(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "mounted"
    target.mkdir()
    monkeypatch.setattr(output_folder, "_must_stay", lambda folder: True)
    unsynced_at: dict[str, set[Path]] = {}
    stock = disk._note_move

    def noting(path: Path, to: Path) -> None:
        unsynced_at[to.name] = set(disk.unsynced)
        stock(path, to)

    monkeypatch.setattr(disk, "_note_move", noting)
    with OutputFolder(target) as folder:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder.path / name).write_text(name)
        folder.commit()
    assert disk.moves[-1] == (target / "config.json", [])
    assert {path.name for path, lacking in disk.moves[:-1] if not lacking} == {"model.safetensors", "tokenizer.json"}
    assert target not in unsynced_at["config.json"]
    assert target not in disk.unsynced


@pytest.mark.parametrize("fault", ["files", "folder", "workspace", "early"])
def test_a_missing_sync_is_noticed(
    models: Path, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    stock = output_folder._sync
    skipped: dict[str, Callable[[Path], Any]] = {
        "files": lambda path: path.suffix == ".json",
        "folder": lambda path: ".partial-" in path.name,
        "workspace": lambda path: path == tmp_path,
        "early": lambda path: True,
    }

    def faulty(path: Path) -> None:
        if not skipped[fault](path):
            stock(path)

    monkeypatch.setattr(output_folder, "_sync", faulty)
    arcmerge.merge(recipe(models), tmp_path / "out", device="cpu")
    assert disk.unsynced or any(lacking for _, lacking in disk.moves)
