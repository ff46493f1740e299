"""torch.compile compiles the ops without a graph break, and the compiled code gives the same bits."""

from __future__ import annotations

import torch

from arcmerge import ops
from arcmerge.gemma2.runtime.kv_cache import Batch, KVCache
from operands import BF16, F32, normal, same_bits
from random_network import TINY, config_of, random_network

CPU = torch.device("cpu")


def test_a_branch_of_a_layer_compiles_whole():
    weights = [normal(*shape, seed=seed) for seed, shape in enumerate([(40, 24), (40, 24), (24, 40), (24,), (24,)])]

    def branch(x, residual):
        gate, up, down, post, pre = weights
        inner = ops.linear_geglu(ops.rmsnorm(x, pre, eps=1e-6), gate, up)
        total, normed = ops.rmsnorm_add_rmsnorm(ops.linear(inner, [down]), residual, post, pre, eps=1e-6)
        return total * 2, normed

    arguments = normal(5, 24, seed=9), normal(5, 24, dtype=F32, seed=10)
    compiled = torch.compile(branch, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(*arguments), branch(*arguments), strict=True):
        assert same_bits(found, expected)


@torch.inference_mode()
def test_a_network_compiles_with_the_cache_that_it_writes():
    network = random_network(config_of(TINY, max_position_embeddings=64), CPU)
    caches = [KVCache(network.config, 1, 32, 8, BF16, CPU) for _ in range(2)]
    batch = Batch.of([[2, 17, 5, 250, 99]], [0], CPU)
    compiled = torch.compile(network.layers, backend="aot_eager")
    found = compiled(network.embed(batch.tokens), batch, caches[0])
    assert same_bits(found, network(batch, caches[1]))
    for layer, (one, other) in enumerate(zip(caches[0].layers, caches[1].layers, strict=True)):
        assert all(same_bits(a[:, :, :5], b[:, :, :5]) for a, b in zip(one, other, strict=True)), layer
