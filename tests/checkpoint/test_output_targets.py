"""Output folders whose parents do not exist yet, and folders that cannot be renamed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_output_folder import NEWER, OLDER, fill, read, write_newer

from arcmerge.checkpoint import output_folder
from arcmerge.checkpoint.output_folder import OutputFolder
from arcmerge.errors import ArcmergeError


def test_parents_are_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_newer(Path("results/run1/merged/"))
    assert read(tmp_path / "results/run1/merged") == NEWER
    assert [path.name for path in (tmp_path / "results/run1").iterdir()] == ["merged"]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_after_a_failure_only_the_parents_that_existed_remain(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    (tmp_path / "results").mkdir()
    with pytest.raises(interruption):
        write_newer(tmp_path / "results/run1/more/merged", interruption)
    assert not list((tmp_path / "results").iterdir())


def test_a_parent_that_another_run_removes_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir, taken = Path.mkdir, []

    def raced(self: Path, *arguments: int, **options: bool) -> None:
        if ".merged.partial-" in self.name and not taken:
            taken.append(self.parent.rmdir())
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", raced)
    write_newer(tmp_path / "results/merged")
    assert taken
    assert read(tmp_path / "results/merged") == NEWER


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("mine")
    with pytest.raises(ArcmergeError, match=r"its parent .*/results must be a folder, got a file"):
        OutputFolder(tmp_path / "results/run1/merged")


@pytest.fixture(params=["current folder", "mount point", "mounted folder", "read-only parent"])
def fixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that cannot be renamed."""
    target = tmp_path / "out here"
    target.mkdir()
    if request.param == "current folder":
        monkeypatch.chdir(target)
    elif request.param == "mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == target)
        (target / "lost+found").mkdir()
    elif request.param == "mounted folder":
        line = f"30 29 0:1 / {str(target).replace(' ', chr(92) + '040')} rw - ext4 /dev/x rw\n"
        monkeypatch.setattr(Path, "read_text", lambda path, **options: line)
    else:  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    return target


def visible(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_an_empty_folder_that_cannot_be_renamed_is_filled(fixed: Path) -> None:
    number = fixed.stat().st_ino
    with OutputFolder(fixed, nbytes=10) as folder:
        assert folder.path.parent == fixed
        fill(folder.path, NEWER)
        folder.commit()
    assert (visible(fixed), fixed.stat().st_ino) == (NEWER, number)
    assert {path.name for path in fixed.iterdir()} - {"lost+found"} == NEWER.keys()
    with pytest.raises(ArcmergeError, match="cannot be replaced in one step"):
        OutputFolder(fixed)


def test_a_failed_move_leaves_it_empty_and_a_killed_one_is_repaired(
    fixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, moved = Path.rename, []

    def failing(self: Path, other: Path) -> Path:
        if other.parent == fixed and other.suffix:
            moved.append(other.name)
            if other.name == "config.json":
                raise OSError(5, "Input/output error")
        return rename(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(ArcmergeError, match="must be put in place, got 'Input/output error'"):
            write_newer(fixed)
    assert moved[-1] == "config.json"
    assert not visible(fixed)
    fill(fixed, {name: content for name, content in OLDER.items() if name != "config.json"})
    (fixed / f".{fixed.name}.partial-1234").mkdir()
    write_newer(fixed)
    assert visible(fixed) == NEWER
    assert {path.name for path in fixed.iterdir()} - {"lost+found"} == NEWER.keys()


def test_files_of_the_user_stay_in_a_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_folder, "_is_mount", lambda folder: True)
    target = fill(tmp_path / "out", {"notes.odt": b"mine"})
    with pytest.raises(ArcmergeError, match=r"got a folder with 'notes\.odt'"):
        OutputFolder(target)
