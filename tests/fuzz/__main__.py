"""python -m fuzz [--inputs N] [--seed S] [TARGET ...]: run N changed inputs, divided among the targets.

With atheris (pip install atheris) changes are guided by coverage; without it they are random. An input that raises
anything but ArcmergeError, takes a minute, or writes outside its folder is kept in .fuzz/ under the name of its target.
`--replay FILE` runs it again. The exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

KEPT = Path(".fuzz")
SECONDS = 60


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="the targets to fuzz; default: all")
    parser.add_argument("--inputs", type=int, default=100_000, help="the number of inputs, of all targets together")
    parser.add_argument("--seed", type=int, default=1, help="the seed of the changes")
    parser.add_argument("--replay", metavar="FILE", type=Path, help="run this kept input again")
    parser.add_argument("--child", metavar="TARGET", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        _fuzz(asked.child, asked.inputs, asked.seed)
        return 0
    from fuzz.targets import TARGETS, World

    if asked.replay:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            World(Path(folder)).run(asked.replay.name.rpartition("-")[0], asked.replay.read_bytes())
        return 0
    names = asked.targets or list(TARGETS)
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir()
    broken = []
    for name in names:
        count = -(-asked.inputs // len(names))
        command = [sys.executable, "-m", "fuzz", "--child", name, "--inputs", str(count), "--seed", str(asked.seed)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
        if done.returncode:  # ended by a signal, most likely
            broken.append(name)
            print(f"{name} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        print(f"{name}: {count} inputs, {len(list(KEPT.glob(f'{name}-*')))} kinds of failures", flush=True)
    return 1 if broken or any(KEPT.iterdir()) else 0


class Watch:
    """Runs inputs and keeps the first of each kind of failure: an exception and the line that raised it."""

    def __init__(self, world: Any, name: str) -> None:
        self._world = world
        self._name = name
        self._seen: set[tuple[str, ...]] = set()
        signal.signal(signal.SIGVTALRM, self._too_long)

    @staticmethod
    def _too_long(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    def __call__(self, data: bytes) -> None:
        from arcmerge.errors import ArcmergeError

        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            self._world.run(self._name, data)
        except ArcmergeError:
            pass
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            kind = (type(error).__name__, frames[-1].filename, str(frames[-1].lineno))
            if kind not in self._seen:
                self._seen.add(kind)
                file = KEPT / f"{self._name}-{hashlib.sha256(data).hexdigest()[:12]}"
                file.write_bytes(data)
                print(f"\n{file}:\n{''.join(traceback.format_exception(error))}", flush=True)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _fuzz(name: str, count: int, seed: int) -> None:
    guided = importlib.util.find_spec("atheris") is not None
    if guided:
        import atheris

        instrumented = atheris.instrument_imports(include=["arcmerge"])
    with instrumented if guided else nullcontext():
        from fuzz.confine import Confined
        from fuzz.targets import TARGETS, World
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as folder:
        world, target = World(Path(folder)), TARGETS[name]
        start = target.seed(world.folder)
        watch = Watch(world, name)
        watch(start)  # everything is imported once before writes elsewhere are refused
        confined = Confined([Path(folder), KEPT])
        if guided:
            corpus = world.folder / "corpus"
            corpus.mkdir()
            (corpus / "seed").write_bytes(start)

            def changed(data: bytes, max_size: int, seed: int) -> bytes:
                return target.mutate(data, random.Random(seed))[:max_size]

            options = [f"-runs={count}", f"-seed={seed}", "-verbosity=0", "-rss_limit_mb=0"]
            options += [f"-max_len={8 * len(start) + 16384}", str(corpus)]
            atheris.Setup([name, *options], watch, custom_mutator=changed)
            atheris.Fuzz()  # ends the process
        rng, data = random.Random(f"{seed} {name}"), start
        for _ in range(count):
            data = target.mutate(data if rng.random() < 0.5 and len(data) < 4 * len(start) else start, rng)
            watch(data)
        confined.close()


if __name__ == "__main__":
    sys.exit(main())
