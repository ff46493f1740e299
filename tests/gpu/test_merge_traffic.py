"""A merge to disk on a fake GPU: how many bytes cross the bus, and what is kept on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import arcmerge
import host_paths
from arcmerge.merging.execution.gpu import kept, processor
from arcmerge.merging.execution.gpu.kept import KeptInputs, kept_bytes
from arcmerge.merging.execution.gpu.slots import ResultBuffers
from arcmerge.merging.execution.work_units import Piece
from arcmerge.merging.options import Options
from arcmerge.merging.plan.tensor_job import Job
from arcmerge.merging.prepare import prepare
from emulation.cuda import Runtime
from fake_devices import needs_fake_devices

# Coefficients, tables of segments, Gram matrices and counts, for each tensor.
SMALL = 1000


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, of which the embedding is larger than a piece and a chunk of the tests below."""
    folder = host_paths.make_pair(tmp_path_factory.mktemp("pair"))
    for seed, name in enumerate(("a", "b")):
        file = folder / name / "model.safetensors"
        weights = load_file(file)
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in weights.items():
            weights[key] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        save_file(weights, file, metadata={"format": "pt"})
    return folder


def weights_of(pair: Path) -> tuple[int, int]:
    """The elements and the number of tensors of a model."""
    tensors = load_file(pair / "a" / "model.safetensors").values()
    return sum(tensor.numel() for tensor in tensors), len(tensors)


@needs_fake_devices
@pytest.mark.parametrize(("room", "to_device"), [("all", 4), ("none", 8)])
def test_weights_cross_the_bus_once(
    gpus: Runtime, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str, to_device: int
) -> None:
    if room == "none":
        monkeypatch.setattr(processor, "kept_bytes", lambda jobs, free: 0)
    elements, count = weights_of(pair)
    found = host_paths.merged_to_disk(pair, tmp_path / "gpu", "cuda:1")
    assert host_paths.same(found, host_paths.merged_to_disk(pair, tmp_path / "cpu", "cpu"))
    assert to_device * elements <= gpus.copied["to devices"] <= to_device * elements + SMALL * count
    assert 2 * elements <= gpus.copied["to the host"] <= 2 * elements + SMALL * count


@needs_fake_devices
def test_a_tensor_without_room_is_staged_again(
    gpus: Runtime, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_paths.cut_small(monkeypatch, elements=4096)
    largest = max(tensor.numel() for tensor in load_file(pair / "a" / "model.safetensors").values())
    monkeypatch.setattr(processor, "kept_bytes", lambda jobs, free: 4 * largest - 1)
    elements, _ = weights_of(pair)
    found = host_paths.merged_to_disk(pair, tmp_path / "gpu", "cuda:1")
    assert gpus.copied["to devices"] >= 4 * (elements + largest)
    assert host_paths.same(found, host_paths.merged_to_disk(pair, tmp_path / "cpu", "cpu"))


@needs_fake_devices
def test_small_pieces_and_two_measures_cross_the_bus_once(
    latest: Runtime, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_paths.cut_small(monkeypatch, elements=4096)
    placed: list[Piece] = []
    place = KeptInputs.place
    monkeypatch.setattr(KeptInputs, "place", lambda kept, piece: placed.append(piece) or place(kept, piece))
    found = host_paths.merged_to_disk(pair, tmp_path / "gpu", "cuda:1", "ties")
    assert host_paths.same(found, host_paths.merged_to_disk(pair, tmp_path / "cpu", "cpu", "ties"))
    assert len(placed) == len(set(placed)) > 0
    assert sum(piece.count for piece in placed) == weights_of(pair)[0]


# ---- what is kept


@pytest.fixture
def jobs(pair: Path) -> tuple[Job, ...]:
    return prepare(host_paths.recipe(pair), Options(), print).plan.jobs


def test_inputs_are_found_when_all_have_arrived_and_freed_when_all_are_filled(jobs: tuple[Job, ...]) -> None:
    index = max(range(len(jobs)), key=lambda each: jobs[each].count)
    count = jobs[index].count
    whole, first, rest = Piece(index, 0, count), Piece(index, 0, 100), Piece(index, 100, count - 100)
    inputs = KeptInputs(jobs, torch.device("cpu"), 4 * count + 512)
    assert inputs.find(first) is None
    for piece in (first, rest):
        for number, part in enumerate(inputs.place(piece) or []):
            part.copy_(torch.arange(piece.first, piece.first + piece.count) % 128 + number)
        assert inputs.find(piece) is None
        inputs.arrived(piece)
    found = inputs.find(whole)
    assert found is not None
    for number, part in enumerate(found):
        assert torch.equal(part, (torch.arange(count) % 128 + number).to(part.dtype))
    other = next(each for each in range(len(jobs)) if each != index and jobs[each].count > 200)
    assert inputs.place(Piece(other, 0, 100)) is None  # no room, and none for the rest of it
    inputs.filled(rest)
    assert inputs.find(first) is not None
    inputs.filled(first)
    assert inputs.find(first) is None
    assert inputs.place(Piece(other, 100, 100)) is None
    inputs.filled(Piece(other, 0, jobs[other].count))
    assert inputs.place(Piece(other, 0, 100)) is not None


def test_a_piece_that_arrives_twice_does_not_stand_for_another(jobs: tuple[Job, ...]) -> None:
    """Where the CPU measures a piece, a second measure stages the others again, and may be cut in another way."""
    index = max(range(len(jobs)), key=lambda each: jobs[each].count)
    count = jobs[index].count
    inputs = KeptInputs(jobs, torch.device("cpu"), 1 << 30)
    whole, half = Piece(index, 0, count), Piece(index, 0, count // 2)
    for piece in (half, half, Piece(index, count // 2 + 1, count - count // 2 - 1)):
        assert inputs.place(piece) is not None
        inputs.arrived(piece)
        assert inputs.find(whole) is None
    inputs.arrived(Piece(index, count // 2 - 5, 10))
    assert inputs.find(whole) is not None


def test_the_room_is_for_two_of_the_largest_and_what_is_measured_ahead(jobs: tuple[Job, ...]) -> None:
    largest = max(job.count for job in jobs)
    assert kept_bytes(jobs, 80 << 30) == kept.AHEAD_BYTES + 2 * 2 * -(-2 * largest // 256) * 256
    assert kept_bytes(jobs, 1000) == 750
    assert kept_bytes((), 80 << 30) == kept.AHEAD_BYTES


def test_buffers_start_at_pages_and_share_memory_with_the_tensors() -> None:
    with torch.inference_mode():
        buffers = ResultBuffers(3, 4096, pinned=False)
    start = torch.frombuffer(buffers.views[0], dtype=torch.uint8).data_ptr()
    assert (start % 4096, [len(view) for view in buffers.views]) == (0, [4096] * 3)
    buffers.at(start + 4096 + 7, 3).copy_(torch.tensor([1, 2, 3], dtype=torch.uint8))
    assert bytes(buffers.views[1][6:11]) == bytes([buffers.views[1][6], 1, 2, 3, buffers.views[1][10]])
    with pytest.raises(AssertionError, match="must go to a buffer"):
        buffers.at(start + 3 * 4096 - 1, 2)


def test_a_file_that_has_become_shorter_is_refused(pair: Path, tmp_path: Path) -> None:
    from arcmerge.merging.execution.cpu.processor import CpuProcessor

    copies = host_paths.make_pair(tmp_path)
    jobs = prepare(host_paths.recipe(copies), Options(), print).plan.jobs
    name = jobs[0].inputs[0].info.name
    checkpoint = jobs[0].inputs[0].checkpoint
    file, info = checkpoint.folder / "model.safetensors", checkpoint.tensors[name]
    target = torch.zeros(info.count, dtype=torch.bfloat16)
    reader = CpuProcessor(jobs, {})
    reader.stage(Piece(0, 0, info.count), 0, target.data_ptr())
    assert torch.equal(target, load_file(file)[name].flatten())
    with file.open("r+b") as opened:
        opened.truncate(info.offset + info.nbytes - 1)
    with pytest.raises(arcmerge.ArcmergeError, match="must be readable to its end, got a file that has become shorter"):
        reader.stage(Piece(0, 0, info.count), 0, target.data_ptr())
    file.unlink()
    with pytest.raises(arcmerge.ArcmergeError, match="must be readable, got 'No such file"):
        reader.stage(Piece(0, 0, info.count), 0, target.data_ptr())
