"""Timings of an op of a Gemma-2 2.6B: arcmerge.ops on all threads, next to transformers."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers.models.gemma2 import modeling_gemma2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _bench import append, interleaved, provenance, spread
from arcmerge import _C
from full_size_pair import Geometry

# The sizes, and values of config.json that are not in Geometry.
SIZES = Geometry()
HEADS, KEY_VALUE_HEADS, HEAD_DIM = SIZES.num_attention_heads, SIZES.num_key_value_heads, SIZES.head_dim
EPSILON, THETA, SOFTCAP, FINAL_SOFTCAP = 1e-6, 10_000.0, 50.0, 30.0
ROUNDS, FEWEST_ROUNDS, MOST_SECONDS = 15, 3, 20  # fewer rounds where they would take longer
SECONDS = 0.005  # that one measurement takes at least
# More than any cache holds: where a model finds its operands in memory, a benchmark has to find them there too.
COLD_BYTES = 512 << 20
# Of the length of a result: bf16 rounds each value by 2^-9 at most, and transformers does so several times.
AGREEMENT = 0.02

SCALE = HEAD_DIM**-0.5
GROUPS = SimpleNamespace(num_key_value_groups=HEADS // KEY_VALUE_HEADS, training=False)

Operands = tuple[Tensor, ...]
Result = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Case:
    """One size of an op: ours and theirs give the same tensors from the same operands; each call takes the next.

    moved: the bytes that the contract says must be moved. operations: those of matrix products.
    """

    name: str
    ours: Callable[..., Result]
    theirs: Callable[..., Result]
    operands: Sequence[Operands]
    moved: int
    operations: int = 0
    theirs_name: str = "transformers"


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """bf16 normal noise."""
    return torch.empty(shape).normal_(std=scale).bfloat16()


def counted(tokens: int) -> str:
    return f"{tokens} token" + "s" * (tokens > 1)


def cold(make: Callable[[], Operands]) -> list[Operands]:
    """As many sets of operands as are needed for none to be in a cache when it is used again."""
    first = make()
    held = sum(tensor.nbytes for tensor in first)
    return [first, *(make() for _ in range(COLD_BYTES // held))]


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def eager_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """transformers' attention: query [B, H, T, Dh], keys and values [B, Hkv, S, Dh] -> [B, T, H, Dh]."""
    options = {"scaling": SCALE, "softcap": SOFTCAP}
    return modeling_gemma2.eager_attention_forward(GROUPS, query, keys, values, mask, **options)[0]


def norm(weight: Tensor) -> torch.nn.Module:
    """transformers' norm with this weight."""
    module = modeling_gemma2.Gemma2RMSNorm(len(weight), EPSILON)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def record(op: str, *cases: Case) -> None:
    """Time cases, print and append the rows: microseconds, GB/s and GFLOP/s of a call.

    A read of memory by all threads is timed between the calls; it is the roof of operands that are not in a cache.
    Raises SystemExit if native, reference and transformers differ.
    """
    origin, memory, rows = provenance("arcmerge", "torch", "transformers"), torch.ones(COLD_BYTES // 4), []
    with torch.inference_mode():
        for case in cases:
            check_agreement(op, case)
            calls = {
                "memory": (lambda: _C.read(memory.data_ptr(), memory.nbytes), memory.nbytes, 0),
                "arcmerge": (turns(case.ours, case.operands), case.moved, case.operations),
                case.theirs_name: (turns(case.theirs, case.operands), case.moved, case.operations),
            }
            seconds = measured({name: call for name, (call, *_) in calls.items()})
            for name, (_, moved, operations) in calls.items():
                times = spread(seconds[name])
                rates = {"gb_per_s": moved / 1e9, "gflop_per_s": operations / 1e9}
                rates = {key: round(amount / times["median"], 2) for key, amount in rates.items()}
                times = {f"microseconds_{key}": round(1e6 * value, 1) for key, value in times.items()}
                rows.append({**origin, "case": case.name, "provider": name, **times, **rates})
                print(f"{op} {case.name:<24}{name:<14}{times['microseconds_median']:12.1f} us", *rates.values())
    print(f"recorded in {append(op, rows)}")


def measured(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each call, in every round."""
    once = {name: timed(call, 1) for name, call in calls.items()}
    repetitions = {name: 1 + int(SECONDS / taken) for name, taken in once.items()}
    longest = max(once[name] * repetitions[name] for name in calls)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _, name in interleaved(list(calls), max(FEWEST_ROUNDS, min(ROUNDS, int(MOST_SECONDS / longest)))):
        seconds[name].append(timed(calls[name], repetitions[name]))
    return seconds


def turns(function: Callable[..., Result], operands: Sequence[Operands]) -> Callable[[], Result]:
    following = itertools.cycle(operands)
    return lambda: function(*next(following))


def timed(call: Callable[[], object], repetitions: int) -> float:
    started = time.perf_counter()
    for _ in range(repetitions):
        call()
    return (time.perf_counter() - started) / repetitions


def check_agreement(op: str, case: Case) -> None:
    operands = case.operands[0]
    found = {"native": flat(case.ours(*operands)), case.theirs_name: flat(case.theirs(*operands))}
    os.environ["ARCMERGE_BACKEND"] = "reference"
    reference = flat(case.ours(*operands))
    del os.environ["ARCMERGE_BACKEND"]
    for name, values in found.items():
        error = float((values - reference).norm() / reference.norm())
        if not error <= AGREEMENT:
            sys.exit(f"{op} {case.name}: {name} differs from the reference by {error:.1e} of it; nothing was timed")


def flat(result: Result) -> Tensor:
    """All values in float64, whatever the shapes are."""
    tensors = [result] if isinstance(result, Tensor) else result
    return torch.cat([tensor.double().flatten() for tensor in tensors])
