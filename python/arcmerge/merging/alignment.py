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
from arcmerge.merging.reference import ModelReference
from arcmerge.merging.tokenizer_recipe import ModelToken, TokenRule
from arcmerge.merging.vocabulary import Vocabulary

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
    """Where the rows of the aligned weight lie, each of `columns` elements in the type of the model's own table.

    addresses: uint64, one for each row of the vocabulary; some point into `computed`, which this object keeps alive.
    """

    addresses: NDArray[np.uint64]
    columns: int
    computed: NDArray[Any] = field(repr=False)


def align(
    vocabulary: Vocabulary,
    name: str,
    tables: Mapping[ModelReference, Table],
    *,
    base: ModelReference | None = None,
    cast: DType | None = None,
) -> dict[ModelReference, RowAddresses]:
    """Where each model's rows of the weight `name` lie, in the order of `vocabulary`.

    tables: the weight in each model that takes part. base: the base of this merge where it is not the recipe's.
    cast: the type that values are rounded to before any arithmetic. Means are summed in float64 and rounded once.

    Raises ArcmergeError where a table has too few rows, where a rule names a row that is not there, and where a row
    cannot stand in for that of a model stored in another type.
    """
    return _Alignment(vocabulary, name, tables, base or vocabulary.base, cast).align()


class _Alignment:
    """One weight of all models on its way to the rows of a vocabulary."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        name: str,
        tables: Mapping[ModelReference, Table],
        base: ModelReference,
        cast: DType | None,
    ) -> None:
        self.vocabulary = vocabulary
        self.name = name
        self.models = list(tables)
        self.tables = list(tables.values())
        self.base = base
        self.cast = cast
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
        stride = self.columns * dtype.itemsize
        addresses = np.empty(len(source), np.uint64)
        missing = source == _MEAN
        for other, table in enumerate(self.tables):
            here = source == other
            if table.dtype == dtype:
                addresses[here] = np.uint64(table.address) + row[here].astype(np.uint64) * np.uint64(stride)
            else:
                missing |= here
        places = np.flatnonzero(missing)
        # The first of the computed rows is that of zeros, the second that of padding.
        computed = np.zeros((2 + len(places), self.columns), _STORED[dtype])
        start = np.uint64(computed.ctypes.data)
        for first in range(0, len(places), _BLOCK):
            block = places[first : first + _BLOCK]
            computed[2 + first : 2 + first + len(block)] = self._compute(number, block, source[block], row[block])
        addresses[places] = start + (np.arange(len(places), dtype=np.uint64) + np.uint64(2)) * np.uint64(stride)
        addresses[source == _ZEROS] = start
        padding = source == _PADDING
        if padding.any():
            addresses[padding] = start + np.uint64(stride)
            computed[1] = self._mean_of_all(dtype, addresses[~padding])
        return RowAddresses(addresses, self.columns, computed)

    def _compute(
        self, number: int, places: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Rows for model `number`, as its type stores them: means, and rows of models stored in another type.

        Raises ArcmergeError where that type does not hold the values.
        """
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
            mean = values[means] / self.has[:, places[means]].sum(axis=0)[:, None]
            values[means] = rounded(mean, self.cast or promote(table.dtype for table in self.tables))
        dtype = self.tables[number].dtype
        stored = encode(values, dtype)
        if not np.array_equal(decode(stored, dtype), values, equal_nan=True):
            raise ArcmergeError(
                f"{self.name}: {self.models[number]} is stored as {dtype.name}, which cannot hold the rows it takes "
                f"from models stored as {', '.join(sorted({t.dtype.name for t in self.tables} - {dtype.name}))}; "
                f"set `dtype: {dtype.name}`, or store the models in one type"
            )
        return stored

    def _read(self, table: Table, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        values = decode(_view(table)[rows], table.dtype)
        return rounded(values, self.cast) if self.cast else values

    def _mean_of_all(self, dtype: DType, addresses: NDArray[np.uint64]) -> NDArray[Any]:
        sums = np.zeros(self.columns)
        cast = self.cast.native if self.cast else -1
        operand = _C.Operand(0, dtype.native, cast, addresses.ctypes.data, self.columns)
        _C.column_sums(operand, len(addresses), self.columns, sums.ctypes.data)
        return encode(rounded(sums / len(addresses), self.cast or dtype), dtype)


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
