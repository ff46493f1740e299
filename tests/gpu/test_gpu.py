"""Every kernel on a GPU against the truth, and every op against its reference in its network.

Without a GPU these tests are skipped; ARCMERGE_DRY=1 runs them in the interpreter and on a tiny network, to test the
tests themselves. `make gpu` runs them first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from arcmerge import ops, slerp
from arcmerge.dispatch.registry import OPS
from arcmerge.gemma2.generation.generate import StoppingCriteria, generate
from arcmerge.gemma2.generation.sampler import SamplingParams
from arcmerge.gemma2.runtime.kv_cache import Batch, KVCache
from arcmerge.gemma2.runtime.network import Network
from cases import SMALL, Case, Random, disagreement
from cases.gemma import GEMMA_2
from random_network import TINY, config_of, random_network

DRY = os.environ.get("ARCMERGE_DRY") == "1"
# The last GPU, which is not the current one where there are several.
LAST = max(torch.cuda.device_count() - 1, 0)
DEVICE = torch.device("cpu") if os.environ.get("TRITON_INTERPRET") == "1" else torch.device("cuda", LAST)
PROMPT_TOKENS, STEPS = (18, 2) if DRY else (700, 3)  # past the window

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu" and not DRY, reason="needs a GPU")]


@pytest.fixture(autouse=True)
def _context_of_the_gpu() -> Iterator[None]:
    """An illegal memory access breaks the CUDA context of the process, so that all later tests would fail as well."""
    yield
    if DEVICE.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.synchronize(DEVICE)
        except RuntimeError as error:
            pytest.exit(f"the context of the GPU is lost: {error}")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_kernel(case: Case) -> None:
    call = case.build(Random(device=DEVICE.type))
    call.launch()
    # The same values again on the CPU, where the truth is computed: a launch may change its inputs.
    truths = case.build(Random()).expected()
    errors = {name: disagreement(call.outputs[name], truth) for name, truth in truths.items()}
    assert max(errors.values()) <= 1, errors


@pytest.fixture(scope="module")
def network() -> Network:
    """Two layers of Gemma-2 2.6B, one of them with a window that the prompt outgrows, and a small vocabulary."""
    if DRY:
        return random_network(config_of(TINY, max_position_embeddings=64), DEVICE)
    return random_network(config_of(GEMMA_2[0], num_hidden_layers=2, vocab_size=8000, sliding_window=300), DEVICE)


class BothWays(TorchDispatchMode):
    """Runs every op by its kernels and by its reference; the tensors that they return or change must agree."""

    def __init__(self) -> None:
        super().__init__()
        self.compared: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "arcmerge":
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("arcmerge::")
        copies, kwargs = tree_map_only(Tensor, torch.clone, args), kwargs or {}
        expected = served_by("reference", func, *copies, **kwargs)
        backend = "triton" if "triton" in OPS[name].implementations else "reference"
        actual = served_by(backend, func, *args, **kwargs)
        self.compared.add(name)
        for index, (ours, reference) in enumerate(zip(tensors(actual, args), tensors(expected, copies), strict=True)):
            error, allowed = difference(ours, reference)
            assert error <= allowed, f"{name}, tensor {index} of {tuple(ours.shape)}: {error} of {allowed} allowed"
        return actual


def served_by(backend: str, func: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with patch.dict(os.environ, ARCMERGE_BACKEND=backend):
        return func(*arguments, **named)


def tensors(*trees: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


# Shares of the maximum. Result and reference are each rounded, by at most half a unit (2^-8 in bfloat16), and so are
# the weights of attention; sums of float32 are in other orders; those of Gram matrices nearly exact.
ALLOWED = {torch.bfloat16: 2.0**-6, torch.float32: 2.0**-16, torch.float64: 1e-9}


def difference(ours: Tensor, reference: Tensor) -> tuple[float, float]:
    """The maximum difference, and the allowed difference; integers, such as token ids, must be equal."""
    assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype)
    error = (ours.double() - reference.double()).abs().max()
    return float(error), ALLOWED.get(ours.dtype, 0.0) * float(reference.double().abs().max())


def prefilled(network: Network, prompt: list[int], capacity: int) -> tuple[KVCache, Tensor]:
    """A cache that holds a prompt, zero elsewhere, and the hidden state of its last token, [1, hidden_size]."""
    cache = KVCache(network.config, 1, capacity, len(prompt), torch.bfloat16, DEVICE)
    for tensor in tensors(cache.layers):
        tensor.zero_()
    return cache, network(Batch.of([prompt], [0], DEVICE), cache)[-1:]


def select(tensor: Tensor, base: Tensor) -> None:
    """Keep a part of the differences, by magnitude and at random."""
    keys = torch.tensor([5], device=DEVICE)
    chances = torch.full((1, 2), 0.7, dtype=torch.float64, device=DEVICE)
    counts = ops.magnitude_histogram([tensor], base, keys, chances, None, None, rounded=True)
    code = int(counts.sum((0, 1)).argmax()) << 16
    cuts = torch.tensor([[2**31 - 1, 0, code, int(counts[..., code >> 16].sum()) // 2]], device=DEVICE)
    factors = torch.ones(1, 4, device=DEVICE)
    options = {"out_dtype": base.dtype, "election": "sum", "rounded": True}
    ops.consensus_combine([tensor], base, factors, cuts, keys, chances, None, **options)


@torch.inference_mode()
def test_ops_agree_with_their_references(network: Network) -> None:
    prompt = [(7 * position) % network.config.vocab_size for position in range(PROMPT_TOKENS)]
    head, softcap = network.weights.embed_tokens, network.config.final_logit_softcapping
    layer = network.weights.layers[0]
    with BothWays() as both:
        cache, hidden = prefilled(network, prompt, len(prompt) + STEPS)
        for step in range(STEPS):
            token = ops.lm_head_argmax(hidden, head, softcap=softcap)
            hidden = network(Batch.of([token.tolist()], [len(prompt) + step], DEVICE), cache)
        ops.lm_head_logprob(hidden, head, token, softcap=softcap)
        steps = torch.zeros_like(token)
        ops.lm_head_sample(hidden, head, steps, seed=1, temperature=0.8, top_k=50, top_p=0.9, softcap=softcap)
        seed, numbers = (torch.tensor(values, device=DEVICE) for values in ([1], [0.8, 1.0, 50.0, 0.9, 0.0]))
        ops.lm_head_draw(hidden, head, steps, seed, numbers.double(), softcap=softcap)
        ops.geglu(layer.gate_proj, layer.up_proj)
        pair = [layer.gate_proj, layer.up_proj]
        ops.combine(pair, ops.gram(pair)[0])
        slerp(*({"w": tensor} for tensor in pair), 0.3)
        ops.slerp(pair[:1], pair[1:], 0.3, normalize=True)
        select(layer.gate_proj, layer.up_proj)
    assert both.compared >= {name for name, op in OPS.items() if "triton" in op.implementations}


@torch.inference_mode()
def test_replayed_steps_give_the_tokens_of_plain_calls(network: Network) -> None:
    prompt = [(5 * position) % network.config.vocab_size for position in range(PROMPT_TOKENS)]
    (answer,) = generate(network, [prompt], SamplingParams(), StoppingCriteria(STEPS + 1, stop_token_ids=())).tokens
    head, softcap = network.weights.embed_tokens, network.config.final_logit_softcapping
    cache, hidden = prefilled(network, prompt, len(prompt) + STEPS)
    plain = [ops.lm_head_argmax(hidden, head, softcap=softcap).item()]
    for step in range(STEPS):
        hidden = network(Batch.of([plain[-1:]], [len(prompt) + step], DEVICE), cache)
        plain.append(ops.lm_head_argmax(hidden, head, softcap=softcap).item())
    assert answer == plain


@torch.inference_mode()
def test_a_captured_slerp_reads_inputs_and_t_anew() -> None:
    if DRY:
        pytest.skip("graphs need a GPU")
    a, b = ([torch.randn(count, device=DEVICE).bfloat16() for count in (70_000, 5)] for _ in range(2))
    t = torch.tensor([0.25], dtype=torch.float64, device=DEVICE)
    ops.slerp(a, b, t)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.slerp(a, b, t), ops.slerp(a, b, 0.75)
    for position in (0.5, 1.0):
        t.fill_(position)
        a[0].normal_()
        graph.replay()
        for found, expected in zip(captured, (ops.slerp(a, b, t), ops.slerp(a, b, 0.75)), strict=True):
            assert all(map(torch.equal, found, expected))
