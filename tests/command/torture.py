"""`make torture`: kill merges and sweeps, fill their disks, fail reads and writes, shrink their parents.

Each run is a forked process, so that hundreds of them take minutes. After each, the older output is as it was or the
new one complete, nothing else is left, and what went wrong was said in a sentence. ARCMERGE_KILLS sets the number of
kills; what mounts a file system needs root, and is skipped without.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import sweeps
import tiny
from arcmerge.checkpoint import output_folder, writer
from arcmerge.checkpoint.layout import SINGLE_NAME
from arcmerge.cli import main
from arcmerge.merging.execution.to_disk import DiskMerge
from arcmerge.sweeping.candidates import of_numbers
from arcmerge.sweeping.sweep import score_candidates

KILLS = int(os.environ.get("ARCMERGE_KILLS", "200"))
STEPS = 60  # sizes of the room on a full disk
MB = 1 << 20
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


def start(work: Callable[[], int], said: Path) -> int:
    """A process that runs `work` and ends with its exit code. Its output goes to the file `said`."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(file, "w")  # pytest may have put something in their place
        code = work()
        sys.stderr.flush()
    finally:
        os._exit(code)


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(work: Callable[[], int], said: Path) -> int:
    return end_of(start(work, said))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lost+found"}


class Bench:
    """Two merges of a tiny pair into one folder, with the result of each."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.parents, self.place, self.out, self.said = folder, place, place / "out", folder / "said"
        for name in ("gemma-a", "gemma-b"):
            tiny.make(name, folder)
        self.results = []
        for number, t in enumerate((0.3, 0.7)):
            (folder / f"{number}.yml").write_text(yaml.safe_dump(sweeps.recipe(folder, t)))
            (folder / str(number)).mkdir()
            assert run(self.merge(number, folder / str(number) / "out"), self.said) == 0, self.said.read_text()
            self.results.append(files_of(folder / str(number) / "out"))

    def merge(self, number: int, out: Path | None = None, **options: str) -> Callable[[], int]:
        more = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        call = ["merge", str(self.parents / f"{number}.yml"), str(out or self.out), "--device", "cpu", "-q", *more]
        return lambda: main(call)

    def require_whole(self) -> None:
        assert files_of(self.out) in self.results
        assert not list(self.place.glob(".*"))

    def sentence(self) -> str:
        text = self.said.read_text()
        assert text.startswith("arcmerge: ")
        assert "Traceback" not in text
        assert "unexpected" not in text
        return text


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    place = tmp_path / "place"
    place.mkdir()
    return Bench(tmp_path, place)


def test_merges_that_are_killed(bench: Bench) -> None:
    draw = random.Random(0)
    assert run(bench.merge(0), bench.said) == 0
    duration, killed = 0.05, 0
    for number in range(KILLS * 3 // 4):
        child = start(bench.merge(number % 2), bench.said)
        time.sleep(draw.uniform(0, 0.8 * duration))
        os.kill(child, signal.SIGKILL)
        killed += end_of(child) == -signal.SIGKILL
        assert files_of(bench.out) in bench.results
        if number % 4 == 0:
            started = time.monotonic()
            assert run(bench.merge(draw.randrange(2)), bench.said) == 0, bench.said.read_text()
            bench.require_whole()
            duration = time.monotonic() - started  # the machine's speed changes with its other work
    print(f"{killed} of {KILLS * 3 // 4} merges were killed before their end")
    assert killed > KILLS // 8


def test_sweeps_that_are_killed(bench: Bench) -> None:
    draw, wanted = random.Random(1), of_numbers([number / 8 for number in range(9)])

    def work(out: Path) -> Callable[[], int]:
        def swept() -> int:
            score_candidates(sweeps.recipe(bench.parents), wanted, sweeps.LeastT(), out, device="cpu", threads=1)
            return 0

        return swept

    started = time.monotonic()
    assert run(work(bench.place / "whole"), bench.said) == 0, bench.said.read_text()
    duration, killed = time.monotonic() - started, 0
    best = (bench.place / "whole" / "best.yml").read_bytes()
    for number in range(KILLS // 4):
        out = bench.place / str(number // 4)
        child = start(work(out), bench.said)
        time.sleep(draw.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        killed += end_of(child) == -signal.SIGKILL
        if number % 4 == 3:
            assert run(work(out), bench.said) == 0, bench.said.read_text()
            assert (out / "best.yml").read_bytes() == best
            assert len(sweeps.rows(out)) == len(wanted)
            assert not list(out.glob(".*"))
    print(f"{killed} of {KILLS // 4} sweeps were killed before their end")
    assert killed > KILLS // 16


@contextmanager
def mounted(kind: str, place: Path, nbytes: int, image: Path | None = None) -> Iterator[None]:
    """Mount a file system of a given size at `place`; ext4 uses the file `image`."""
    if kind == "tmpfs":
        call = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(place)]
    else:
        assert image is not None
        with image.open("wb") as file:
            file.truncate(nbytes)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)], check=True)
        call = ["mount", "-o", "loop", str(image), str(place)]
    if subprocess.run(call, capture_output=True).returncode:
        pytest.skip(f"{kind} cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@needs_root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_disks_that_are_full_at_every_stage(bench: Bench, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of free space, the disk becomes full at a file, at a block, or at a folder."""
    monkeypatch.setattr(output_folder, "require_space", lambda folder, nbytes: None)
    monkeypatch.setattr(writer, "require_space", lambda folder, nbytes: None)
    failed = 0
    with mounted(kind, bench.place, 4 * MB, bench.parents / "image"):
        assert run(bench.merge(0), bench.said) == 0, bench.said.read_text()
        ballast = bench.place / "ballast"
        needed = sum(map(len, bench.results[0].values())) + 64 * 1024
        for free in range(0, needed, 4096 * max(1, needed // 4096 // STEPS)):
            ballast.unlink(missing_ok=True)
            size = shutil.disk_usage(bench.place).free - free
            with ballast.open("wb") as file, suppress(OSError):  # ext4 needs some room itself
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            code = run(bench.merge(1, out_shard_size="20K"), bench.said)
            if code:
                failed += 1
                assert "No space left on device" in bench.sentence()
                bench.require_whole()
            else:
                shutil.rmtree(bench.out)
                ballast.unlink()
                assert run(bench.merge(0), bench.said) == 0
    print(f"{failed} merges found the {kind} full")
    assert failed > STEPS // 6


@needs_root
def test_disks_whose_reads_fail(bench: Bench) -> None:
    """A loop device reports an error for a range that its file no longer has."""
    image, failed = bench.parents / "image", 0
    with mounted("ext4", bench.place, 4 * MB, image):
        for name in ("gemma-a", "gemma-b"):
            shutil.copytree(bench.parents / name, bench.place / name)
        recipe = bench.parents / "0.yml"
        recipe.write_text(yaml.safe_dump(sweeps.recipe(bench.place, 0.3)))
        out = bench.parents / "0" / "out"
        before = files_of(out)
        subprocess.run(["sync", "-f", str(bench.place)], check=True)
        for length in range(4 * MB, MB // 2, -MB // 8):
            os.truncate(image, length)
            DROP_CACHES.write_text("3")
            if run(bench.merge(0, out), bench.said):
                failed += 1
                bench.sentence()
                assert files_of(out) == before
            before = files_of(out)
            assert not list(out.parent.glob(".*"))
    print(f"{failed} merges could not read their parents")
    assert failed > 3


@needs_root
def test_disks_whose_writes_fail(bench: Bench) -> None:
    """A loop device reports an error when its file cannot grow."""
    under, failed = bench.parents / "under", 0
    under.mkdir()
    with mounted("tmpfs", under, 3 * MB), mounted("ext4", bench.place, 64 * MB, under / "image"):
        for number in range(20):
            if run(bench.merge(0, bench.place / str(number)), bench.said):
                failed += 1
                bench.sentence()
                assert not (bench.place / str(number)).exists()
        DROP_CACHES.write_text("3")
        for out in bench.place.glob("[0-9]*"):  # what was called done is on the disk
            assert files_of(out).keys() == bench.results[0].keys()
            assert (out / SINGLE_NAME).read_bytes()[4096:] == bench.results[0][SINGLE_NAME][4096:]
    print(f"{failed} of 20 merges could not be written")
    assert failed


def test_parents_that_shrink_at_any_moment(bench: Bench) -> None:
    draw, failed = random.Random(2), 0
    source = bench.parents / "gemma-b" / "model.safetensors"
    content = source.read_bytes()
    original: Any = DiskMerge.run

    def shrinking(self: Any, progress: Any) -> None:
        child = os.fork()
        if not child:
            time.sleep(draw.uniform(0, 0.02))
            os.truncate(source, draw.randrange(len(content)))
            os._exit(0)
        original(self, progress)
        os.waitpid(child, 0)

    DiskMerge.run = shrinking  # type: ignore[method-assign]
    try:
        assert run(bench.merge(0, bench.out), bench.said) == 1
        for _ in range(max(KILLS // 5, 4)):
            source.write_bytes(content)
            draw.random()
            assert run(bench.merge(0), bench.said) == 1
            assert "has changed while it was read" in bench.sentence()
            assert not bench.out.exists()
            assert not list(bench.place.glob(".*"))
            failed += 1
    finally:
        DiskMerge.run = original  # type: ignore[method-assign]
    print(f"{failed} merges saw a parent shrink")
