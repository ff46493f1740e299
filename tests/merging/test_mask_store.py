"""The random masks that the statistics pass keeps for the pass that writes."""

from pathlib import Path

import pytest
import torch

import arcmerge
import tiny
from arcmerge.merging.execution import work_units
from arcmerge.merging.execution.cpu import masks
from arcmerge.merging.execution.cpu.masks import MaskStore
from arcmerge.merging.execution.in_memory import InMemoryMerge
from arcmerge.merging.execution.work_units import Piece
from arcmerge.merging.methods.measure import NO_CUT, Selection
from arcmerge.merging.options import Options
from arcmerge.merging.prepare import prepare
from golden.compare import assert_same_bits, load

HALF = Selection((NO_CUT,) * 2, (1, 2), ((0.5, 0.5),) * 2, rounded=True)
OTHER = Selection((NO_CUT,) * 2, (1, 3), ((0.5, 0.5),) * 2, rounded=True)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_units, "PIECE_ELEMENTS", 256)


def parts(store, first, count, selection=HALF):
    return [(part.first, part.count, bool(part.masks)) for part in store.parts(Piece(0, first, count), selection)]


def test_a_piece_is_cut_where_masks_begin():
    store = MaskStore()
    assert store.new(Piece(0, 256, 256), HALF)
    assert parts(store, 10, 600) == [(10, 246, False), (256, 256, True), (512, 98, False)]


def test_masks_are_dropped_once_all_elements_were_read():
    store = MaskStore()
    store.new(Piece(0, 0, 256), HALF)
    assert parts(store, 0, 40) == [(0, 40, True)]
    assert parts(store, 40, 216) == [(40, 216, True)]
    assert parts(store, 0, 256) == [(0, 256, False)]


def test_masks_that_are_kept_can_be_read_again_until_others_are_drawn():
    store = MaskStore(10_000, keeps=True)
    store.new(Piece(0, 0, 256), HALF)
    assert parts(store, 0, 256) == parts(store, 0, 256) == [(0, 256, True)]
    store.new(Piece(0, 0, 256), OTHER)
    assert parts(store, 0, 256) == [(0, 256, False)]
    assert parts(store, 0, 256, OTHER) == [(0, 256, True)]


def test_masks_of_other_random_numbers_are_not_read():
    store = MaskStore()
    store.new(Piece(0, 0, 256), HALF)
    assert parts(store, 0, 256, OTHER) == [(0, 256, False)]


def test_a_piece_that_finds_no_room_has_no_masks(monkeypatch):
    monkeypatch.setattr(masks, "MASK_BYTES", 100)
    store = MaskStore()
    assert store.new(Piece(0, 0, 256), HALF)
    assert not store.new(Piece(0, 256, 256), HALF)
    assert parts(store, 0, 512) == [(0, 256, True), (256, 256, False)]
    assert store.new(Piece(0, 256, 256), HALF)  # now there is room


def test_a_selection_without_random_numbers_has_no_masks():
    plain = Selection((NO_CUT,), (0,), ((1.0, 1.0),), rounded=True)
    assert not MaskStore().new(Piece(0, 0, 256), plain)
    assert parts(MaskStore(), 0, 200, plain) == [(0, 200, False)]


def recipe_of(method: str, models: Path, other: Path, weight: float = 0.6, density: float = 0.4) -> dict[str, object]:
    return {
        "merge_method": method,
        "base_model": str(models / "gemma-a"),
        "models": [
            {"model": str(folder), "parameters": {"weight": weight, "density": density}}
            for folder in (models / "gemma-b", other)
        ],
        "dtype": "bfloat16",
    }


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each part that was written had its masks."""
    found = list[bool]()
    stock = MaskStore.parts

    def counting(self: MaskStore, piece: Piece, selection: Selection) -> object:
        for part in stock(self, piece, selection):
            found.append(bool(part.masks))
            yield part

    monkeypatch.setattr(MaskStore, "parts", counting)
    return found


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_masks_in_memory_serve_other_weights_until_another_density_is_drawn(
    method: str, models: Path, tmp_path: Path, used: list[bool]
) -> None:
    tiny.make("gemma-c", tmp_path)
    other = tmp_path / "gemma-c"
    options = Options(device="cpu", threads=2)
    merged = InMemoryMerge(prepare(recipe_of(method, models, other), options, lambda *_: None))
    # weight, density, and whether the masks that were drawn last are those of this density
    for number, (weight, density, kept) in enumerate([(0.3, 0.4, True), (0.3, 0.7, True), (0.5, 0.4, False)]):
        used.clear()
        merged.set_parameters({"weight": weight, "density": density})
        assert used
        assert set(used) == {kept}
        folder = tmp_path / str(number)
        arcmerge.merge(recipe_of(method, models, other, weight, density), folder, device="cpu")
        for name, tensor in load(folder).items():
            assert merged.tensor(name).numpy().tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("method", ["dare_ties", "della", "della_linear"])
def test_results_do_not_depend_on_masks_that_are_kept(
    method: str, models: Path, tmp_path: Path, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make("gemma-c", tmp_path)
    recipe = recipe_of(method, models, tmp_path / "gemma-c")
    arcmerge.merge(recipe, tmp_path / "with", device="cpu", threads=2)
    assert used
    assert all(used)
    monkeypatch.setattr(masks, "MASK_BYTES", 0)
    used.clear()
    arcmerge.merge(recipe, tmp_path / "without", device="cpu", threads=2)
    assert used
    assert not any(used)
    assert_same_bits(load(tmp_path / "with"), load(tmp_path / "without"))
