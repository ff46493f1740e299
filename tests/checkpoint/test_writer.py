"""The shard file: every way to write it gives the same bytes, and every failure is one error."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arcmerge.checkpoint.writer import BLOCK, ShardFile, address_of, aligned_buffer
from arcmerge.errors import ArcmergeError

PIECE = 4 * BLOCK
SHARED_MEMORY = Path("/dev/shm")


def content(nbytes: int) -> bytes:
    return np.random.default_rng(nbytes).bytes(nbytes)


def write_pieces(file: ShardFile, data: bytes, order: Callable[[list[int]], list[int]] = list) -> None:
    buffer = aligned_buffer(PIECE)
    for start in order(list(range(0, len(data), PIECE))):
        piece = data[start : start + PIECE]
        buffer[: len(piece)] = piece
        file.write(start, buffer[: len(piece)])


def write_file(path: Path, data: bytes) -> None:
    with ShardFile(path, len(data)) as file:
        write_pieces(file, data)
        file.finish()


def refuse_direct(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Make the system refuse direct writes: when the flag is set, or at the write, as some network file systems do."""
    set_flags, pwrite = fcntl.fcntl, os.pwrite

    def fcntl_refusing(file: int, command: int, flags: int = 0) -> Any:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return set_flags(file, command, flags)

    def pwrite_refusing(file: int, data: Any, offset: int) -> int:
        if set_flags(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(file, data, offset)

    if when == "flag":
        monkeypatch.setattr(fcntl, "fcntl", fcntl_refusing)
    else:
        monkeypatch.setattr(os, "pwrite", pwrite_refusing)


@pytest.mark.parametrize("nbytes", [1, BLOCK - 1, BLOCK, BLOCK + 1, PIECE, 3 * PIECE, 3 * PIECE + BLOCK + 17])
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_bytes_are_written(tmp_path: Path, nbytes: int, backwards: bool) -> None:
    data = content(nbytes)
    with ShardFile(tmp_path / "shard", nbytes) as file:
        write_pieces(file, data, lambda starts: starts[:: -1 if backwards else 1])
        file.finish()
    assert (tmp_path / "shard").read_bytes() == data


@pytest.mark.parametrize("when", ["flag", "write"])
def test_falls_back_to_buffered_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    refuse_direct(monkeypatch, when)
    data = content(2 * PIECE + 5)
    with ShardFile(tmp_path / "shard", len(data)) as file:
        write_pieces(file, data)
        assert not file.direct
        file.finish()
    assert (tmp_path / "shard").read_bytes() == data


@pytest.mark.skipif(not os.access(SHARED_MEMORY, os.W_OK), reason="needs a tmpfs at /dev/shm")
def test_bytes_are_written_on_tmpfs(tmp_path: Path) -> None:
    data = content(2 * PIECE + 5)
    path = SHARED_MEMORY / f"arcmerge-test-{os.getpid()}"
    try:
        write_file(path, data)
        assert path.read_bytes() == data
    finally:
        path.unlink(missing_ok=True)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limits=st.lists(st.integers(1, 3 * BLOCK), min_size=1, max_size=6))
def test_short_writes_are_continued(tmp_path: Path, limits: list[int]) -> None:
    data = content(PIECE + 9)
    pwrite, remaining = os.pwrite, list(limits)

    def short(file: int, view: memoryview, offset: int) -> int:
        return pwrite(file, bytes(view[: remaining.pop() if remaining else None]), offset)

    path = tmp_path / "shard"
    path.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch, ShardFile(path, len(data)) as file:
        patch.setattr(os, "pwrite", short)
        write_pieces(file, data)
        file.finish()
    assert path.read_bytes() == data


def test_several_threads_write(tmp_path: Path) -> None:
    data = content(64 * BLOCK + 100)
    with ShardFile(tmp_path / "shard", len(data)) as file:
        threads = [
            threading.Thread(target=write_pieces, args=(file, data, lambda starts, part=part: starts[part::4]))
            for part in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        file.finish()
    assert (tmp_path / "shard").read_bytes() == data


def test_a_header_may_lie_anywhere_in_memory(tmp_path: Path) -> None:
    data = content(2 * BLOCK)
    with ShardFile(tmp_path / "shard", len(data)) as file:
        file.write(BLOCK, memoryview(data)[BLOCK:])
        file.write(0, data[:BLOCK])
        file.finish()
    assert (tmp_path / "shard").read_bytes() == data


def test_the_mode_is_0644_minus_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        ShardFile(tmp_path / "shard", 10).close()
    finally:
        os.umask(before)
    assert (tmp_path / "shard").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(1, BLOCK), (0, BLOCK - 1), (0, BLOCK + 1), (2 * BLOCK, BLOCK)],
    ids=["offset", "short of a block", "over a block", "beyond the end"],
)
def test_partial_blocks_inside_the_file_are_refused(tmp_path: Path, offset: int, nbytes: int) -> None:
    with (
        ShardFile(tmp_path / "shard", 2 * BLOCK + 10) as file,
        pytest.raises(ValueError, match="must cover whole blocks"),
    ):
        file.write(offset, aligned_buffer(nbytes)[:nbytes])


def test_an_incomplete_file_cannot_be_finished(tmp_path: Path) -> None:
    with ShardFile(tmp_path / "shard", 2 * BLOCK) as file:
        file.write(0, aligned_buffer(BLOCK))
        with pytest.raises(ValueError, match="must be written completely, got 4096 of 8192 bytes"):
            file.finish()


def test_too_small_a_disk_is_an_error_before_a_byte_is_written(tmp_path: Path) -> None:
    with pytest.raises(ArcmergeError, match=r"must have 1,000,000,000,000\.0 MB free for the output, got .* MB"):
        ShardFile(tmp_path / "shard", 10**18)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync"])
def test_a_full_or_broken_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ArcmergeError, match="shard must be writable, got 'No space left on device'"):
        write_file(tmp_path / "shard", content(BLOCK))


def test_a_file_system_without_allocation_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    data = content(PIECE + 1)
    write_file(tmp_path / "shard", data)
    assert (tmp_path / "shard").read_bytes() == data


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "shard").write_text("kept")
    with pytest.raises(ArcmergeError, match="must be writable, got 'File exists'"):
        ShardFile(tmp_path / "shard", 4)
    assert (tmp_path / "shard").read_text() == "kept"


@pytest.mark.parametrize("nbytes", [1, BLOCK, BLOCK + 1])
def test_buffers_start_at_a_page_and_hold_whole_blocks(nbytes: int) -> None:
    buffer = aligned_buffer(nbytes)
    assert address_of(buffer) % BLOCK == 0
    assert nbytes <= len(buffer) < nbytes + BLOCK
    assert len(buffer) % BLOCK == 0
    assert not any(buffer)
