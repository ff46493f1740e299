"""The rows of embeddings and heads in the order of one vocabulary.

For each model on its own, the row of a token is the first of these that applies (the semantics are mergekit's):

    the model's own row of the token           unless a rule of the recipe says `force`
    the row that the recipe's rule names
    the base's row of the token
    the row of the only model that has it
    the mean of the rows of the models that have it
    zeros, where no model has it

Rows that stand for no token, as padding, hold the mean of the model's rows (the advice of Hewitt, "Initializing New
Word Embeddings for Pretrained Language Models", 2021). Nothing is copied but rows that exist nowhere: the kernels
gather rows by address from the weights as they are mapped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcmerge import _C
from arcmerge.dtypes import BF16, F16, F32, DType, promote
from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.tokenizer_block import ModelToken, TokenRule
from arcmerge.merging.vocabulary.vocabulary import Vocabulary

# Where a row comes from, other than from a model (0, 1, ...).
_ZEROS, _MEAN, _PADDING = -1, -2, -3
# Rows that are computed at a time: 32 MB of float64 at 1,024 columns.
_BLOCK = 4096

_STORED: Mapping[DType, np.dtype[Any]] = {
    BF16: np.dtype(np.uint16),
    F16: np.dtype(np.float16),
    F32: np.dtype(np.float32),
}


@dataclass(frozen=True)
class Table:
    """A weight with a row for each token: (rows, columns), row-major, at `address`, which its owner keeps mapped."""

    address: int
    dtype: DType
    rows: int
    columns: int


@dataclass(frozen=True)
class RowAddresses:
    """Where the rows of the aligned weight lie, each of `columns` elements of `dtype`.

    addresses: uint64, one for each row of the vocabulary; some point into `computed`, which this object keeps alive.
    wider: further rows, of values that `dtype` does not hold, None where it holds all. Each of the two has zeros for
    the rows of the other: the weight is their sum.
    """

    addresses: NDArray[np.uint64]
    columns: int
    dtype: DType
    computed: NDArray[Any] = field(repr=False)
    wider: RowAddresses | None = None

    @property
    def parts(self) -> tuple[RowAddresses, ...]:
        return (self,) if self.wider is None else (self, self.wider)


def align(
    vocabulary: Vocabulary,
    name: str,
    tables: Mapping[ModelReference, Table],
    *,
    base: ModelReference | None = None,
    cast: DType | None = None,
) -> dict[ModelReference, RowAddresses]:
    """Where each model's rows of the weight `name` lie, in the order of `vocabulary`.

    tables: the weight in each model that takes part. base: the base of this merge, None if it has none.
    cast: the type that values are rounded to before any arithmetic. Means are summed in float64 and rounded once.

    Raises ArcmergeError where a table has too few rows and where a rule names a row that is not there.
    """
    return _Alignment(vocabulary, name, tables, base, cast).align()


class _Alignment:
    """One weight of all models on its way to the rows of a vocabulary."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        name: str,
        tables: Mapping[ModelReference, Table],
        base: ModelReference | None,
        cast: DType | None,
    ) -> None:
        self.vocabulary = vocabulary
        self.name = name
        self.models = list(tables)
        self.tables = list(tables.values())
        self.base = base
        self.cast = cast
        self.common = cast or promote(table.dtype for table in self.tables)
        self.columns = self.tables[0].columns
        self.own = np.stack([vocabulary.rows[model] for model in self.models])
        self.has = self.own >= 0

    def align(self) -> dict[ModelReference, RowAddresses]:
        self._check()
        source, row, forced = self._stand_ins()
        aligned = {}
        for number, model in enumerate(self.models):
            own = self.has[number] & ~forced
            aligned[model] = self._gather(number, np.where(own, number, source), np.where(own, self.own[number], row))
        return aligned

    def _check(self) -> None:
        problems = []
        for model, table, own in zip(self.models, self.tables, self.own, strict=True):
            if own.max() >= table.rows:
                problems.append(
                    f"{self.name}: {model} has {table.rows} rows but tokens up to number {own.max()}; "
                    "its vocab_size in config.json must be the number of rows"
                )
            if table.columns != self.columns:
                problems.append(
                    f"{self.name}: rows must be of one length, got {self.columns} in {self.models[0]} and "
                    f"{table.columns} in {model}; models of different size cannot be merged"
                )
        if problems:
            raise ArcmergeError(problems)

    def _stand_ins(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """For each row, where the models that lack it take it from: a model (or how it is computed) and the row there;
        and whether models that have it do so too."""
        owners = self.has.sum(axis=0)
        source = np.where(owners == 0, _ZEROS, np.where(owners == 1, self.has.argmax(axis=0), _MEAN))
        if self.base in self.models:
            base = self.models.index(self.base)
            source = np.where(self.has[base], base, source)
        row = np.take_along_axis(self.own, np.maximum(source, 0)[None], axis=0)[0]
        forced = np.zeros(len(row), bool)
        for token, rule in self.vocabulary.rules.items():
            number = self.vocabulary.ids[token]
            if rule.source is not None and (rule.force or owners[number] < len(self.models)):
                source[number], row[number] = self._ruled(token, rule)
            forced[number] = rule.force
        named = np.zeros(len(row), bool)
        named[np.fromiter(self.vocabulary.ids.values(), np.int64, len(self.vocabulary.ids))] = True
        source[~named] = _PADDING
        return source, row, forced

    def _ruled(self, token: str, rule: TokenRule) -> tuple[int, int]:
        """The model and the row in it that a rule names."""
        place = f"tokenizer.tokens[{token!r}].source"
        if rule.source == "zero" or rule.source is None:
            return _ZEROS, -1
        wanted = rule.source if isinstance(rule.source, ModelToken) else ModelToken(rule.source, token)
        if wanted.model not in self.models:
            raise ArcmergeError(
                f"{place}: must be a model whose {self.name} takes part in the merge, got {wanted.model}; "
                f"use one of {', '.join(map(str, self.models))}"
            )
        model = self.models.index(wanted.model)
        ids = self.vocabulary.model_ids[wanted.model]
        row = wanted.token_id if wanted.token is None else ids.get(wanted.token)
        if row is None or row >= self.tables[model].rows:
            shown = repr(wanted.token) if wanted.token is not None else f"number {row}"
            raise ArcmergeError(
                f"{place}: {wanted.model} has no row for token {shown} among its {self.tables[model].rows}; "
                "name a token that it has"
            )
        return model, row

    def _gather(self, number: int, source: NDArray[np.int64], row: NDArray[np.int64]) -> RowAddresses:
        """The rows of model `number` by address, those that exist nowhere in its type computed."""
        dtype = self.tables[number].dtype
        mapped = np.zeros(len(source), np.uint64)
        for other, table in enumerate(self.tables):
            if table.dtype == dtype:
                here = source == other
                stride = np.uint64(self.columns * dtype.itemsize)
                mapped[here] = np.uint64(table.address) + row[here].astype(np.uint64) * stride
        exists = mapped > 0
        padding = source == _PADDING
        places = np.flatnonzero(~exists & ~padding & (source != _ZEROS))
        kind = dtype if dtype in (self.common, F32) else F32
        # The first of the computed rows is that of zeros, the second that of padding.
        computed = np.zeros((2 + len(places), self.columns), _STORED[kind])
        for first in range(0, len(places), _BLOCK):
            block = places[first : first + _BLOCK]
            computed[2 + first : 2 + first + len(block)] = encode(self._compute(block, source[block], row[block]), kind)
        start, stride = np.uint64(computed.ctypes.data), np.uint64(self.columns * kind.itemsize)
        addresses = np.full(len(source), start)
        addresses[places] = start + (np.arange(len(places), dtype=np.uint64) + np.uint64(2)) * stride
        rows = RowAddresses(addresses, self.columns, kind, computed)
        if kind == dtype:
            addresses[exists] = mapped[exists]
        else:
            zeros = np.zeros(self.columns, _STORED[dtype])
            mapped[~exists] = zeros.ctypes.data
            rows = RowAddresses(mapped, self.columns, dtype, zeros, wider=rows)
        if padding.any():
            computed[1] = encode(self._mean(rows, ~padding), kind)
            addresses[padding] = start + stride
        return rows

    def _compute(
        self, places: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Rows that no table holds in the type asked for: means, and rows of models stored in another type."""
        values = np.zeros((len(places), self.columns))
        means = source == _MEAN
        for other, table in enumerate(self.tables):
            here = source == other
            if here.any():
                values[here] = self._read(table, row[here])
            has = means & self.has[other, places]
            if has.any():
                values[has] += self._read(table, self.own[other, places[has]])
        if means.any():
            values[means] = rounded(values[means] / self.has[:, places[means]].sum(axis=0)[:, None], self.common)
        return values

    def _read(self, table: Table, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        values = decode(_view(table)[rows], table.dtype)
        return rounded(values, self.cast) if self.cast else values

    def _mean(self, rows: RowAddresses, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        cast = self.cast.native if self.cast else -1
        total = np.zeros(self.columns)
        for part in rows.parts:
            sums, addresses = np.zeros(self.columns), part.addresses[chosen]
            operand = _C.Operand(0, part.dtype.native, cast, addresses.ctypes.data, self.columns)
            _C.column_sums(operand, len(addresses), self.columns, sums.ctypes.data)
            total += sums
        return rounded(total / np.count_nonzero(chosen), self.common)


def _view(table: Table) -> NDArray[Any]:
    count = table.rows * table.columns
    memory = (ctypes.c_char * (count * table.dtype.itemsize)).from_address(table.address)
    return np.frombuffer(memoryview(memory), _STORED[table.dtype], count).reshape(table.rows, table.columns)


def decode(stored: NDArray[Any], dtype: DType) -> NDArray[np.float64]:
    """The values of elements as numpy holds them: bfloat16, which it does not know, as uint16."""
    if dtype == BF16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def encode(values: NDArray[np.float64], dtype: DType) -> NDArray[Any]:
    """`values` rounded once to `dtype`, to nearest, ties to even; too large ones become infinite."""
    with np.errstate(over="ignore"):
        if dtype != BF16:
            return values.astype(_STORED[dtype])
        # Eight significant bits, but no bit below 2^-133, the smallest subnormal number.
        _, exponent = np.frexp(values)
        step = np.exp2(np.maximum(exponent - 8, -133).astype(np.float64))
        exact = (np.rint(values / step) * step).astype(np.float32)
    bits: NDArray[np.uint32] = exact.view(np.uint32) >> np.uint32(16)
    return bits.astype(np.uint16)


def rounded(values: NDArray[np.float64], dtype: DType) -> NDArray[np.float64]:
    return decode(encode(values, dtype), dtype)
