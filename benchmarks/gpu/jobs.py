"""The measurements on a GPU, one function each. A worker runs them and keeps the caches of this module between them.

A measurement has the median "seconds" with its 20th and 80th percentile and the number of repetitions; "bytes"
are those that must move, "operations" those of matrix products.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
from benchmarks._bench import provenance, spread
from benchmarks.gpu.device import DRY, Device, Gpu
from torch import Tensor

from arcmerge import ops
from arcmerge.gemma2.config import Gemma2Config
from arcmerge.gemma2.generation.generate import StoppingCriteria, generate
from arcmerge.gemma2.generation.sampler import Sampler, SamplingParams
from arcmerge.gemma2.runtime.decode_graph import DecodeGraph
from arcmerge.gemma2.runtime.kv_cache import Batch, KVCache
from arcmerge.gemma2.runtime.network import Network
from arcmerge.gemma2.weights import tensor_shapes
from arcmerge.kernels.combine import combine
from arcmerge.kernels.gram import gram
from arcmerge.ops.attention_packages import plan
from cases import MODELS, SMALL, Blank, Case
from cases import attention as attention_cases
from cases.gemma import GEMMA_2
from random_network import TINY, config_of, random_network

Measurement = dict[str, Any]

BF16 = torch.bfloat16
SHAPE = TINY if DRY else GEMMA_2[0]
# Two results of bfloat16, each rounded twice, may differ by so much of the maximum.
AGREEMENT = 2.0**-6
PREFILLS = (3, 18) if DRY else (512, 2048, 8192)
CONTEXT, STEPS = (3, 2) if DRY else (512, 64)

if DRY:
    from emulation import interpreter

    interpreter.install()


def smallest_cases() -> list[Case]:
    """The smallest case of each op."""
    by_size = sorted(SMALL, key=lambda case: -case.build(Blank()).minimum_bytes)
    return list({case.op: case for case in by_size}.values())


def measured_cases() -> list[Case]:
    """Every launch that a Gemma-2 makes, the smallest model first; in dry mode the smallest case of each op."""
    if DRY:
        return smallest_cases()
    sizes = [shape.name for shape in GEMMA_2]
    return sorted(MODELS, key=lambda case: next(n for n, size in enumerate(sizes) if case.name.startswith(size)))


@cache
def device() -> Device:
    """The device of this process. On a GPU, TF32 stays off, so that products of float32 in torch are exact."""
    return Device() if DRY else Gpu()


def statistics(seconds: Sequence[float]) -> Measurement:
    spreads = spread(seconds)
    return {
        "seconds": spreads["median"],
        "p20": spreads["p20"],
        "p80": spreads["p80"],
        "repetitions": len(seconds),
    }


def environment() -> dict[str, Any]:
    """Names, versions and sizes that explain the figures."""
    found: dict[str, Any] = {
        **provenance("arcmerge", "torch", "triton", "numpy"),
        "device": "none: a dry run in the interpreter",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "driver": None,
    }
    if isinstance(device(), Gpu):
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().partition("\n")[0] or None


# Roofs: the rates of plain torch with one kind of work.


def roof_copy() -> Measurement:
    """Copies 2 GiB; bytes count reads and writes."""
    source = torch.zeros(1 << (16 if DRY else 31), dtype=torch.uint8, device=device().memory)
    out = torch.empty_like(source)
    return {**statistics(device().seconds(lambda: out.copy_(source))), "bytes": 2 * source.numel(), "operations": 0}


def roof_read() -> Measurement:
    """Sums 4 GiB of float32."""
    source = torch.zeros(1 << (14 if DRY else 30), device=device().memory)
    return {**statistics(device().seconds(source.sum)), "bytes": 4 * source.numel(), "operations": 0}


def roof_matmul() -> Measurement:
    """Multiplies two square matrices of bfloat16, of random values, because zeros would save power and time."""
    size = 64 if DRY else 8192
    one, other = (torch.randn(size, size, device=device().memory).to(BF16) for _ in range(2))
    out = torch.empty_like(one)
    seconds = device().seconds(lambda: torch.mm(one, other, out=out))
    return {**statistics(seconds), "bytes": 6 * size**2, "operations": 2 * size**3}


class OnDevice:
    """Draws the tensors of a case where they are used: the largest have more than two gigabytes."""

    def normal(self, *shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device().memory).normal_(0.0, scale)

    def empty(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device().memory)

    def exact(self, values: Tensor) -> Tensor:
        return values.clone().to(device().memory)


def kernel(op: str, name: str) -> Measurement:
    """The launches of a case, repeated, each with its inputs evicted from the L2 cache."""
    (case,) = (case for case in measured_cases() if (case.op, case.name) == (op, name))
    call = case.build(OnDevice())
    timed = statistics(device().seconds(call.launch))
    return {**timed, "bytes": call.minimum_bytes, "operations": call.operations}


def installed(packages: Iterable[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is not None]


def by_package(package: str, name: str) -> Measurement:
    """A case of `attention` by another package, whose result must be that of our kernel.

    Its plan, which reads the lengths of the sequences on the host, is made before the clock starts.
    """
    (case,) = (case for case in SMALL + MODELS if (case.op, case.name) == ("attention", name))
    call, given = case.build(OnDevice()), mock.Mock()
    with mock.patch.object(attention_cases, "attention", given):
        call.launch()
    (out, *tensors), numbers = given.call_args
    run = plan(package, *tensors, **numbers)
    call.launch()
    difference = (run(*tensors[:3]).float() - out.float()).abs().max() / out.float().abs().max()
    if not difference <= AGREEMENT:
        raise ValueError(f"{package} and our kernel differ by {float(difference):.1e} of the maximum")
    timed = statistics(device().seconds(lambda: run(*tensors[:3])))
    return {**timed, "bytes": call.minimum_bytes, "operations": call.operations}


# The journeys, with random weights of the shapes of 2.6B.


@cache
def _config() -> Gemma2Config:
    return config_of(SHAPE)


def merge() -> dict[str, Measurement]:
    """A slerp of two models in memory into a third, by the clock of the host; and its two large launches alone."""
    counts = [torch.Size(shape).numel() for shape in tensor_shapes(_config()).values()]
    groups = [[OnDevice().normal(count) for _ in range(2)] for count in counts]
    outs = [OnDevice().empty(count) for count in counts]
    matrices = torch.empty(len(counts), 2, 2, dtype=torch.float64, device=device().memory)
    nonfinite = torch.zeros(len(counts), dtype=torch.int64, device=device().memory)
    factors = torch.ones(len(counts), 2, device=device().memory)
    a, b = ([group[side] for group in groups] for side in (0, 1))

    def whole() -> None:
        ops.slerp(a, b, 0.3, nonfinite=nonfinite)

    merged = device().wall_seconds(whole, 1.0)
    timed = {
        "of 2, whole": (merged, 6),
        "of 2, gram": (device().seconds(lambda: gram(groups, matrices), 1.0), 4),
        "of 2, combine": (device().seconds(lambda: combine(outs, groups, factors, nonfinite), 1.0), 6),
    }
    if int(nonfinite.sum()):
        raise ValueError("the merge of finite weights is not finite")
    return {
        name: {**statistics(seconds), "bytes": width * sum(counts), "operations": 0}
        for name, (seconds, width) in timed.items()
    }


@cache
def _network() -> Network:
    return random_network(_config(), device().memory)


def _prompt(tokens: int) -> list[int]:
    return [(7919 * position) % SHAPE.vocabulary for position in range(tokens)]


@torch.inference_mode()
def prefill(tokens: int) -> Measurement:
    """A prompt, to the choice of its first token. Operations are those of the projections, a little less than all."""
    network, limits = _network(), StoppingCriteria(1, stop_token_ids=())
    seconds = device().wall_seconds(lambda: generate(network, [_prompt(tokens)], SamplingParams(), limits), 2.0)
    layers = [tensor for layer in network.weights.layers for tensor in vars(layer).values()]
    return {
        **statistics(seconds),
        "bytes": network.weights.nbytes,
        "operations": 2 * tokens * sum(tensor.numel() for tensor in layers if tensor.dim() == 2),
        "tokens": tokens,
    }


@torch.inference_mode()
def decode() -> dict[str, Measurement]:
    """Greedy steps for one sequence: those of generate, and steps for which the host does not wait.

    The first step of a cache, which captures its CUDA graph, has a row of its own. Bytes are those of the weights, and
    of keys and values at the start, none of which a window hides.
    """
    network, config, memory = _network(), _config(), device().memory
    prompt = _prompt(CONTEXT)
    generate(network, [prompt], SamplingParams(), StoppingCriteria(2, stop_token_ids=()))  # compiles
    times: list[float] = []

    def arrived(row: int, token: int) -> bool:
        times.append(time.perf_counter())
        return False

    limits = StoppingCriteria(STEPS + 2, stop_token_ids=(), on_token=arrived)
    (answer,) = generate(network, [prompt], SamplingParams(), limits).tokens
    waited = times[-1] - times[1]  # the second token is that of the capture

    filled = KVCache(config, 1, CONTEXT + STEPS, CONTEXT, BF16, memory)
    network(Batch.of([prompt], [0], memory), filled)
    step = DecodeGraph(network, filled, 1)
    first = torch.tensor(answer[:1]).to(memory)
    sampler = Sampler(network, SamplingParams(), [prompt], range(1))
    step.start([CONTEXT])
    device().finish()
    captured = device().once(lambda: step(first, [True], sampler))
    step.start([CONTEXT])
    chosen: list[Tensor] = []

    def replay() -> None:
        tokens = first
        for _ in range(STEPS):
            tokens = step(tokens, [True], sampler)
            chosen.append(tokens.clone())

    seconds = device().once(replay)
    replayed = torch.cat(chosen).tolist()
    if replayed != answer[1 : STEPS + 1]:
        raise ValueError(f"replayed steps choose {replayed[:8]}..., generate {answer[1:9]}...")
    kept = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * CONTEXT
    common = {"bytes": network.weights.nbytes + kept, "operations": 0, "tokens": 1}
    return {
        "first step, which captures": {"seconds": captured, "repetitions": 1, **common},
        "step by step": {"seconds": waited / STEPS, "repetitions": STEPS, **common},
        "without waiting": {"seconds": seconds / STEPS, "repetitions": STEPS, **common},
    }


@torch.inference_mode()
def launches() -> float | None:
    """Kernels of a decoding step for each layer, without the head. None on the CPU."""
    if not isinstance(device(), Gpu):
        return None
    empty = KVCache(_config(), 1, CONTEXT, 1, BF16, device().memory)
    batch = Batch.of([[2]], [0], device().memory)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        _network()(batch, empty)
        device().finish()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events) / _config().num_hidden_layers
