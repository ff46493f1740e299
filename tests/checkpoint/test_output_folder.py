"""The output folder appears complete or not at all, and no file of the user is ever lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save

from arcmerge.checkpoint import output_folder
from arcmerge.checkpoint.header import encode_header
from arcmerge.checkpoint.output_folder import OutputFolder
from arcmerge.errors import ArcmergeError

WEIGHTS = encode_header([], 64, ["config.json", "README.md"])
OLDER = {"config.json": b"{}", "model.safetensors": WEIGHTS, "README.md": b"# older"}
NEWER = {"config.json": b'{"new": 1}', "model.safetensors": WEIGHTS + b"newer"}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(params=["exchange", "two renames"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(output_folder, "_exchange", lambda one, other: False)


@pytest.mark.parametrize("before", ["absent", "empty", "older output"])
@pytest.mark.usefixtures("swap")
def test_commit_puts_the_whole_folder_in_place(tmp_path: Path, before: str) -> None:
    target = tmp_path / "out"
    if before != "absent":
        fill(target, OLDER if before == "older output" else {})
    umask = os.umask(0o022)
    try:
        with OutputFolder(target, nbytes=100) as folder:
            fill(folder.path, NEWER)
            assert folder.path.parent == target.parent
            folder.commit()
            assert read(target) == NEWER
    finally:
        os.umask(umask)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


def write_newer(target: Path, interruption: type[BaseException] | None = None) -> None:
    with OutputFolder(target) as folder:
        fill(folder.path, NEWER)
        if interruption is not None:
            raise interruption
        folder.commit()


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_leaves_the_older_output(tmp_path: Path, interruption: type[BaseException]) -> None:
    target = fill(tmp_path / "out", OLDER)
    with pytest.raises(interruption):
        write_newer(target, interruption)
    assert read(target) == OLDER
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_until_the_older_output_is_removed(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = fill(tmp_path / "out", OLDER)
    before = signal.signal(number, signal.default_int_handler)
    rmtree = output_folder.shutil.rmtree

    def interrupted(path: Path, ignore_errors: bool) -> None:
        signal.raise_signal(number)
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(output_folder.shutil, "rmtree", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_newer(target)
    finally:
        signal.signal(number, before)
    assert read(target) == NEWER
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(file: int, how: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output_folder.fcntl, "flock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_newer(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_another_run_removes_before_it_is_locked_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, cleared = output_folder.fcntl.flock, []

    def raced(file: int, how: int) -> None:
        if not cleared:
            cleared.extend(tmp_path.glob(".out.*"))
            cleared[0].rmdir()
        flock(file, how)

    monkeypatch.setattr(output_folder.fcntl, "flock", raced)
    write_newer(tmp_path / "out")
    assert read(tmp_path / "out") == NEWER


def test_without_commit_nothing_appears(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as folder:
        fill(folder.path, NEWER)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("swap")
def test_a_failed_rename_leaves_the_older_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = fill(tmp_path / "out", OLDER)
    exchange, rename = output_folder._exchange, Path.rename

    def failing_exchange(one: Path, other: Path) -> bool:
        return exchange(one, other.with_name("absent"))

    def failing_rename(self: Path, other: Path) -> Path:
        return rename(self if ".partial-" not in self.name or other != target else self / "absent", other)

    monkeypatch.setattr(output_folder, "_exchange", failing_exchange)
    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(ArcmergeError, match="must be put in place, got 'No such file or directory'"):
        write_newer(target)
    assert read(target) == OLDER
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_appear_during_the_work_are_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with OutputFolder(target) as folder:
        fill(folder.path, NEWER)
        fill(target, {"notes.odt": b"mine"})
        with pytest.raises(ArcmergeError, match=r"got a folder with 'notes\.odt'"):
            folder.commit()
    assert read(target) == {"notes.odt": b"mine"}


CHILD = """
import sys, time
from pathlib import Path
from arcmerge.checkpoint.output_folder import OutputFolder
from arcmerge.checkpoint.writer import ShardFile, aligned_buffer
with OutputFolder(Path(sys.argv[1])) as folder, ShardFile(folder.path / "model.safetensors", 1 << 20) as file:
    file.write(0, aligned_buffer(1 << 19))
    print("half", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_leaves_the_older_output_and_the_next_run_removes_the_rest(tmp_path: Path) -> None:
    target = fill(tmp_path / "out", OLDER)
    with subprocess.Popen([sys.executable, "-c", CHILD, str(target)], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "half\n"
            (partial,) = tmp_path.glob(".out.partial-*")
            with OutputFolder(target):
                assert partial.exists(), "the folder of a run that is not finished was removed"
        finally:
            child.send_signal(signal.SIGKILL)
    assert read(target) == OLDER
    assert partial.exists()
    with OutputFolder(target) as folder:
        assert not partial.exists()
        fill(folder.path, NEWER)
        folder.commit()
    assert read(target) == NEWER
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_a_longer_name_is_not_removed(tmp_path: Path) -> None:
    neighbour = fill(tmp_path / ".out.other.partial-1234", NEWER)
    with OutputFolder(tmp_path / "out"):
        assert read(neighbour) == NEWER


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({**OLDER, "thesis.docx": b""}, "got a folder with 'thesis.docx'; move that away"),
        ({**OLDER, "recipe.yml": b""}, "got a folder with 'recipe.yml'"),
        ({"data.json": b"", "more.json": b""}, "got a folder with 'data.json' but no model"),
        ({"a.safetensors": b""}, "got a folder with 'a.safetensors', which no merge wrote"),
        (
            {**OLDER, "model.safetensors": save({}, {"format": "pt"})},
            "'model.safetensors', which no merge wrote",
        ),
        (
            {**OLDER, "adapter_model.safetensors": save({}, {"format": "pt"})},
            "'adapter_model.safetensors', which no",
        ),
        ({**OLDER, "trainer_state.json": b"{}"}, "got a folder with 'trainer_state.json'"),
    ],
    ids=["unknown file", "a recipe", "json only", "weights", "fine-tune", "adapter", "trained here"],
)
def test_a_folder_that_is_not_an_output_is_refused(tmp_path: Path, files: dict[str, bytes], sentence: str) -> None:
    target = fill(tmp_path / "out", files)
    with pytest.raises(ArcmergeError) as caught:
        OutputFolder(target)
    assert sentence in str(caught.value)
    assert read(target) == files


def test_a_folder_with_sub_folders_is_refused(tmp_path: Path) -> None:
    target = fill(tmp_path / "out", OLDER)
    (target / "checkpoint-100").mkdir()
    with pytest.raises(ArcmergeError, match="got a folder with 'checkpoint-100'"):
        OutputFolder(target)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("kept")
    with pytest.raises(ArcmergeError, match="must be a folder, got a file of this name"):
        OutputFolder(tmp_path / "out")


def test_the_parent_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ArcmergeError, match="must be writable"):
        OutputFolder(tmp_path / "out")


@pytest.mark.parametrize(("later", "extra"), [(False, {}), (True, {}), (False, {"trainer_state.json": b"{}"})])
def test_an_output_of_mergekit_is_replaced_unless_a_model_was_saved_over_it(
    tmp_path: Path, later: bool, extra: dict[str, bytes]
) -> None:
    """mergekit writes its weights first and mergekit_config.yml after them."""
    files = {"config.json": b"{}", "model.safetensors": save({}, {"format": "pt"}), "mergekit_config.yml": b"", **extra}
    target = fill(tmp_path / "out", files)
    os.utime(target / "mergekit_config.yml", (10, 10))
    os.utime(target / "model.safetensors", (11, 11) if later else (9, 9))
    if later or extra:
        with pytest.raises(ArcmergeError, match="must be empty or an earlier merge to be replaced"):
            write_newer(target)
        assert read(target) == files
    else:
        write_newer(target)
        assert read(target) == NEWER


def test_the_disk_must_have_enough_space(tmp_path: Path) -> None:
    with pytest.raises(ArcmergeError, match=r"must have 1,000,000,000,000\.0 MB free for the output, got .* MB"):
        OutputFolder(tmp_path / "out", nbytes=10**18)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "relation"),
    [
        ("A", "is the input"),
        ("A/merged", "lies inside the input"),
        ("link", "is the input"),
        ("models", "contains the input"),
    ],
)
def test_inputs_are_protected(tmp_path: Path, target: str, relation: str) -> None:
    (tmp_path / "models").mkdir()
    inputs = [fill(tmp_path / "A", {**OLDER, "LICENCE.pdf": b""}), fill(tmp_path / "models", OLDER) / "config.json"]
    (tmp_path / "link").symlink_to("A")
    with pytest.raises(ArcmergeError, match=relation):
        OutputFolder(tmp_path / target, inputs)


def test_a_link_to_an_older_output_stays_a_link(tmp_path: Path) -> None:
    fill(tmp_path / "real", OLDER)
    (tmp_path / "out").symlink_to("real")
    with OutputFolder(tmp_path / "out") as folder:
        fill(folder.path, NEWER)
        folder.commit()
    assert (tmp_path / "out").is_symlink()
    assert read(tmp_path / "real") == NEWER
