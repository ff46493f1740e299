"""The rows of embeddings and heads in the order of one vocabulary.

In each model, the row of a token is the first of these that exists (the semantics are mergekit's):

    the model's own row of the token           unless a rule of the recipe says `force`
    the row that the recipe's rule names
    the base's row of the token
    the row of the only model that has the token
    the mean of the rows of the models that have the token
    zeros, if no model has the token

Rows without a token, such as padding, have the mean of the model's rows (Hewitt, "Initializing New Word Embeddings for
Pretrained Language Models", 2021). Existing rows are not copied: the kernels gather them by address from the mapped
weights.
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
from arcmerge.errors import ArcmergeError, Problems
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.tokenizer_block import ModelToken, TokenRule
from arcmerge.merging.vocabulary.vocabulary import Vocabulary

# Sources of a row other than the index of a model.
_ZEROS, _MEAN, _PADDING = -1, -2, -3
# Number of rows that are computed at a time: 32 MB of float64 at 1,024 columns.
_BLOCK = 4096

_STORED: Mapping[DType, np.dtype[Any]] = {
    BF16: np.dtype(np.uint16),
    F16: np.dtype(np.float16),
    F32: np.dtype(np.float32),
}


@dataclass(frozen=True)
class Table:
    """A weight (rows, columns) with one row for each token, row-major, at an address that its owner keeps mapped."""

    address: int
    dtype: DType
    rows: int
    columns: int


@dataclass(frozen=True)
class RowAddresses:
    """The addresses of the rows of an aligned weight.

    Args:
        addresses: uint64, one address for each row of the vocabulary. Some point into `computed`.
        columns: number of elements of a row.
        dtype: dtype of the elements.
        computed: memory of the rows that exist in no model.
        wider: further rows in a wider dtype, for values that `dtype` cannot represent; None if there are none. Each of
            the two has zeros for the rows of the other, so the weight is their sum.
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
    """Find the rows of a weight in each model, in the order of a vocabulary.

    Args:
        vocabulary: the vocabulary of the result.
        name: name of the weight.
        tables: the weight of each model.
        base: the base model of the merge, if there is one.
        cast: dtype that values are rounded to before the arithmetic. Means are summed in float64 and rounded once.

    Returns:
        The addresses of the rows for each model.

    Raises:
        ArcmergeError: if a table has too few rows, or a rule names a row that does not exist.
    """
    return _Alignment(vocabulary, name, tables, base, cast).align()


class _Alignment:
    """The alignment of one weight of all models."""

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
        for index, model in enumerate(self.models):
            own = self.has[index] & ~forced
            aligned[model] = self._gather(index, np.where(own, index, source), np.where(own, self.own[index], row))
        return aligned

    def _check(self) -> None:
        problems = Problems()
        for model, table, own in zip(self.models, self.tables, self.own, strict=True):
            if own.max() >= table.rows:
                problems.add(
                    f"{model}: '{self.name}' must have more than {own.max()} rows, the largest token id, got "
                    f"{table.rows}; set vocab_size in config.json to the number of rows"
                )
            if table.columns != self.columns:
                problems.add(
                    f"'{self.name}' must have rows of the same length in all models, got {self.columns} in "
                    f"{self.models[0]} and {table.columns} in {model}; models of different sizes cannot be merged"
                )
        problems.raise_if_any()

    def _stand_ins(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """The rows that replace missing ones: the source of each (a model, or _ZEROS, _MEAN, _PADDING), the row there,
        and whether models that have the row use the replacement, too."""
        owners = self.has.sum(axis=0)
        source = np.where(owners == 0, _ZEROS, np.where(owners == 1, self.has.argmax(axis=0), _MEAN))
        if self.base in self.models:
            base = self.models.index(self.base)
            source = np.where(self.has[base], base, source)
        row = np.take_along_axis(self.own, np.maximum(source, 0)[None], axis=0)[0]
        forced = np.zeros(len(row), bool)
        for token, rule in self.vocabulary.rules.items():
            token_id = self.vocabulary.ids[token]
            if rule.source is not None and (rule.force or owners[token_id] < len(self.models)):
                source[token_id], row[token_id] = self._ruled(token, rule)
            forced[token_id] = rule.force
        named = np.zeros(len(row), bool)
        named[np.fromiter(self.vocabulary.ids.values(), np.int64, len(self.vocabulary.ids))] = True
        source[~named] = _PADDING
        return source, row, forced

    def _ruled(self, token: str, rule: TokenRule) -> tuple[int, int]:
        """The model and the row in it that a rule names."""
        location = f'tokenizer.tokens["{token}"].source'
        if rule.source == "zero" or rule.source is None:
            return _ZEROS, -1
        wanted = rule.source if isinstance(rule.source, ModelToken) else ModelToken(rule.source, token)
        if wanted.model not in self.models:
            raise ArcmergeError(
                f"'{location}' must be a model whose {self.name} is merged, got {wanted.model}; "
                f"use one of {', '.join(map(str, self.models))}"
            )
        model = self.models.index(wanted.model)
        ids = self.vocabulary.model_ids[wanted.model]
        row = wanted.token_id if wanted.token is None else ids.get(wanted.token)
        if row is None or row >= self.tables[model].rows:
            shown = f"token {wanted.token!r}" if wanted.token is not None else f"token id {row}"
            raise ArcmergeError(
                f"'{location}' must be one of the {self.tables[model].rows} rows of {wanted.model}, got {shown}, "
                "which has no row; name a token that the model has"
            )
        return model, row

    def _gather(self, index: int, source: NDArray[np.int64], row: NDArray[np.int64]) -> RowAddresses:
        """The addresses of the rows of a model. Rows that do not exist in its dtype are computed."""
        dtype = self.tables[index].dtype
        mapped = np.zeros(len(source), np.uint64)
        for other, table in enumerate(self.tables):
            if table.dtype == dtype:
                here = source == other
                stride = np.uint64(self.columns * dtype.itemsize)
                mapped[here] = np.uint64(table.address) + row[here].astype(np.uint64) * stride
        exists = mapped > 0
        padding = source == _PADDING
        missing = np.flatnonzero(~exists & ~padding & (source != _ZEROS))
        kind = dtype if dtype in (self.common, F32) else F32
        # The first computed row is zeros, the second is padding.
        computed = np.zeros((2 + len(missing), self.columns), _STORED[kind])
        for first in range(0, len(missing), _BLOCK):
            block = missing[first : first + _BLOCK]
            computed[2 + first : 2 + first + len(block)] = encode(self._compute(block, source[block], row[block]), kind)
        start, stride = np.uint64(computed.ctypes.data), np.uint64(self.columns * kind.itemsize)
        addresses = np.full(len(source), start)
        addresses[missing] = start + (np.arange(len(missing), dtype=np.uint64) + np.uint64(2)) * stride
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
        self, missing: NDArray[np.int64], source: NDArray[np.int64], row: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Rows that no table has in the right dtype: means, and rows of models that are stored in another dtype."""
        values = np.zeros((len(missing), self.columns))
        means = source == _MEAN
        for other, table in enumerate(self.tables):
            here = source == other
            if here.any():
                values[here] = self._read(table, row[here])
            has = means & self.has[other, missing]
            if has.any():
                values[has] += self._read(table, self.own[other, missing[has]])
        if means.any():
            values[means] = rounded(values[means] / self.has[:, missing[means]].sum(axis=0)[:, None], self.common)
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
    """The values of stored elements. numpy has no bfloat16, so its elements are stored as uint16."""
    if dtype == BF16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def encode(values: NDArray[np.float64], dtype: DType) -> NDArray[Any]:
    """`values` rounded once to `dtype`, to nearest with ties to even. Values out of range become infinite."""
    with np.errstate(over="ignore"):
        if dtype != BF16:
            return values.astype(_STORED[dtype])
        # Eight significant bits, and no bit below 2^-133, the smallest subnormal number.
        _, exponent = np.frexp(values)
        step = np.exp2(np.maximum(exponent - 8, -133).astype(np.float64))
        exact = (np.rint(values / step) * step).astype(np.float32)
    bits: NDArray[np.uint32] = exact.view(np.uint32) >> np.uint32(16)
    return bits.astype(np.uint16)


def rounded(values: NDArray[np.float64], dtype: DType) -> NDArray[np.float64]:
    return decode(encode(values, dtype), dtype)
