"""A few changed inputs of each kind of file; `make fuzz` runs many."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from arcmerge.errors import ArcmergeError
from fuzz.confine import Confined
from fuzz.targets import TARGETS, World

INPUTS = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", TARGETS)
def test_a_changed_file_ends_in_a_result_or_a_sentence(world: World, name: str) -> None:
    target = TARGETS[name]
    start = target.seed(world.folder)
    if name == "adapter":
        with pytest.raises(ArcmergeError, match="got a LoRA adapter"):
            world.run(name, start)
    else:
        world.run(name, start)
    chance = random.Random(name)
    confined = Confined([world.folder])
    refused = 0
    try:
        for _ in range(INPUTS):
            try:
                world.run(name, target.mutate(start, chance))
            except ArcmergeError:
                refused += 1
    finally:
        confined.close()
    assert refused, "changes that nothing refuses test nothing"


def test_writes_elsewhere_are_seen(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    confined = Confined([tmp_path / "in"])
    try:
        (tmp_path / "in" / "a").write_text("a")
        for attempt in (
            lambda: (tmp_path / "b").write_text("b"),
            lambda: (tmp_path / "in" / "link" / "c").write_text("c"),
            lambda: (tmp_path / "in" / "a").rename(tmp_path / "d"),
            lambda: os.mkdir(tmp_path / "in" / ".." / "e"),
            lambda: os.system("true"),
        ):
            with pytest.raises(OSError, match=r"elsewhere|ran a program"):
                attempt()
    finally:
        confined.close()
