"""Native linear and linear_geglu: the order of their sums, bit by bit, and the thread pool."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from arcmerge import _C
from arcmerge.dispatch.registry import backends
from arcmerge.ops import geglu, linear, linear_geglu
from operands import BF16, CODES, F32, at_offset, every_variant, normal, same_bits, using

dtypes = pytest.mark.parametrize("dtype", [BF16, F32], ids=str)


@pytest.fixture
def threads():
    """Sets the number of threads, and resets it after the test."""
    before = _C.threads()
    yield _C.set_threads
    _C.set_threads(before)


def native(x, weights, offset=0):
    """Operands `offset` bytes past an aligned address, and an output surrounded by NaN that must stay."""
    buffers = [at_offset(tensor.flatten(), offset) for tensor in (x, *weights)]
    count, rows, guard = len(x), sum(map(len, weights)), 5
    out = torch.full((count * rows + 2 * guard,), float("nan"), dtype=x.dtype)
    matrices = [(buffer.data_ptr() + offset, len(weight)) for buffer, weight in zip(buffers[1:], weights, strict=True)]
    to = out.data_ptr() + guard * out.element_size()
    _C.linear(to, buffers[0].data_ptr() + offset, count, x.shape[1], matrices, CODES[x.dtype])
    assert out[:guard].isnan().all()
    assert out[len(out) - guard :].isnan().all()
    return out[guard : len(out) - guard].view(count, rows)


def native_geglu(x, gate, up):
    out = torch.full((len(x), len(gate)), float("nan"), dtype=x.dtype)
    addresses = x.data_ptr(), *x.shape, gate.data_ptr(), up.data_ptr()
    _C.linear_geglu(out.data_ptr(), *addresses, len(gate), CODES[x.dtype])
    return out


def sums_in_lanes(x, weight):
    """x times weight, summed in the order of matmul/gemv.cpp.

    Products must be exact in float32, so that FMA changes nothing. A step has 128 bytes, for 2 * 16 lanes;
    of two bf16 in a lane, the odd element comes first.
    """
    per_lane = 4 // x.element_size()
    step = 32 * per_lane
    operands = [torch.nn.functional.pad(tensor.float(), (0, -tensor.shape[1] % step)) for tensor in (x, weight)]
    products = operands[0][:, None, :].numpy() * operands[1][None, :, :].numpy()
    lanes = np.zeros((*products.shape[:2], 32), np.float32)
    for terms in np.split(products, products.shape[2] // step, axis=2):
        for place in reversed(range(per_lane)):
            lanes = lanes + terms[:, :, place::per_lane]
    sums = lanes[:, :, :16] + lanes[:, :, 16:]
    for half in (8, 4, 2, 1):
        sums = sums[:, :, :half] + sums[:, :, half:]
    return torch.from_numpy(sums[:, :, 0].copy()).to(x.dtype)


@every_variant
@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize(
    ("count", "length"),
    [(1, 1), (1, 63), (2, 64), (3, 65), (4, 128), (5, 130), (7, 200), (16, 517), (1, 5300), (2, 5300)],
)
def test_bf16_sums_in_the_documented_order_and_rounded_once(variant, offset, count, length):
    x, weights = normal(count, length), [normal(rows, length, seed=rows) for rows in (70, 1, 9)]
    with using(variant):
        assert same_bits(native(x, weights, offset), sums_in_lanes(x, torch.cat(weights)))


@every_variant
@pytest.mark.parametrize(
    ("count", "length"), [(1, 1), (1, 31), (2, 32), (3, 33), (5, 70), (16, 300), (1, 2600), (18, 1), (50, 700)]
)
def test_f32_within_the_error_of_f32_sums(variant, count, length):
    x, weight = normal(count, length, dtype=F32), normal(71, length, dtype=F32, seed=1)
    with using(variant):
        out = native(x, [weight], 4)
    truth, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    # Each term of a lane is rounded, and at most ten sums follow. With many rows all terms are in one lane.
    terms = length if count > 16 else length // 32 + 1
    assert ((out - truth).abs() <= (2 * terms + 10) * 2.0**-24 * size).all()
    if count > 16:
        return
    with using(variant):
        exact = native(x.bfloat16().float(), [weight.bfloat16().float()])
    assert same_bits(exact, sums_in_lanes(x.bfloat16().float(), weight.bfloat16().float()))


@every_variant
@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize(
    ("count", "length"), [(17, 1), (17, 90), (31, 383), (32, 384), (33, 385), (48, 800), (785, 30), (20, 140_000)]
)
def test_bf16_sums_of_many_rows_in_the_order_of_their_terms(variant, offset, count, length):
    if length > 100_000 and variant == "baseline":
        pytest.skip("it has the same code and takes long")
    x, weights = normal(count, length), [normal(rows, length, seed=rows) for rows in (97, 1, 9)]
    sums = np.zeros((count, 107), np.float32)
    for column, row in zip(x.float().T.numpy(), torch.cat(weights).float().T.numpy(), strict=True):
        sums += column[:, None] * row[None, :]  # products of bf16 are exact
    with using(variant):
        assert same_bits(native(x, weights, offset), torch.from_numpy(sums).bfloat16())


@every_variant
@dtypes
@pytest.mark.parametrize("length", [96, 6000])
def test_a_row_does_not_depend_on_other_rows(variant, dtype, length):
    x, weight = normal(40, length, dtype=dtype), normal(67, length, dtype=dtype, seed=1)
    with using(variant):
        alone = torch.cat([native(row[None], [weight]) for row in x])
        for count in (2, 3, 4, 5, 6, 7, 8, 16):
            assert same_bits(native(x[:count], [weight]), alone[:count])
        assert same_bits(native(x[:3], [weight[:5], weight[5:]]), alone[:3])
        many = native(x, [weight])
        for rows in (slice(17), slice(3, 36), slice(8, 40)):
            assert same_bits(native(x[rows], [weight]), many[rows])
        assert same_bits(native(x, [weight[:5], weight[5:]]), many)


@every_variant
def test_infinity_and_nan_stay_in_their_outputs(variant):
    x, weight = torch.ones(3, 83, dtype=BF16), torch.ones(70, 83, dtype=BF16)
    weight[65, 82], x[1, 81] = float("inf"), float("nan")
    with using(variant):
        out = native(x, [weight])
    assert out[1].isnan().all()
    assert (out[0] == torch.where(torch.arange(70) == 65, float("inf"), 83.0)).all()


@dtypes
@pytest.mark.parametrize("count", [1, 3, 16, 21])
def test_stepwise_has_the_bits_of_torch(dtype, count):
    x, gate, up = normal(count, 100, dtype=dtype), *normal(2, 133, 100, dtype=dtype, seed=1)
    rounded = [torch.nn.functional.linear(x, weight) for weight in (gate, up)]
    assert same_bits(linear(x, [gate, up], stepwise=True), torch.cat(rounded, 1))
    assert same_bits(linear_geglu(x, gate, up, stepwise=True), geglu(*rounded, stepwise=True))


@pytest.mark.parametrize("instructions", [True, False])
def test_torch_serves_many_rows_if_it_has_instructions_for_bfloat16(monkeypatch, instructions):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: instructions)
    x, gate, up = normal(18, 700), *normal(2, 133, 700, seed=1)
    torch_serves = linear(x, [gate, up]), linear_geglu(x, gate, up)
    native_serves = native(x, [gate, up]), native_geglu(x, gate, up)
    products = [torch.mm(x, weight.T) for weight in (gate, up)]
    expected = (torch.cat(products, 1), geglu(*products)) if instructions else native_serves
    for found, right in zip(torch_serves, expected, strict=True):
        assert same_bits(found, right)


@every_variant
@pytest.mark.parametrize("count", [1, 3, 16, 21])
def test_geglu_is_rounded_once(variant, count):
    x, gate, up = normal(count, 100), *normal(2, 133, 100, seed=1)
    with using(variant):
        wide = native_geglu(x.float(), gate.float(), up.float())
        narrow = native_geglu(x, gate, up)
    # bf16 and f32 differ in the order of their sums, by at most 100 roundings. The slope of gelu is below 1.13.
    sizes = [x.double().abs() @ weight.double().abs().T for weight in (gate, up)]
    values = [x.double() @ weight.double().T for weight in (gate, up)]
    error = 200 * 2.0**-24 * (1.13 * sizes[0] * values[1].abs() + sizes[1] * values[0].abs())
    assert ((narrow.double() - wide.double()).abs() <= 2.0**-8 * (wide.double().abs() + error) + error).all()
    truth = torch.nn.functional.gelu(values[0], approximate="tanh") * values[1]
    assert ((wide.double() - truth).abs() <= error + 2.0**-22 * truth.abs()).all()


@dtypes
@pytest.mark.parametrize("count", [1, 16, 17])
def test_the_native_backend_serves_the_ops(monkeypatch, dtype, count):
    monkeypatch.delenv("ARCMERGE_BACKEND", raising=False)
    assert all(backends("cpu")[name].startswith("native") for name in ("linear", "linear_geglu"))
    # Integers, whose sums are exact in any order.
    strided = normal(100, count, dtype=dtype).round().T
    weights = [normal(rows, 200, dtype=dtype, seed=rows).round()[:, ::2] for rows in (9, 20, 20)]
    products = linear(strided, weights)
    activated = linear_geglu(strided, *weights[1:], stepwise=True)
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    assert same_bits(products, linear(strided, weights))
    defined = linear_geglu(strided, *weights[1:], stepwise=True)
    # gelu and the product may each be rounded in the other direction; in the reference 1 + tanh cancels to a few 2^-24.
    sizes = [products[:, part].double().abs() for part in (slice(9, 29), slice(29, 49))]
    tolerance = 2 * torch.finfo(dtype).eps * defined.abs() + 2.0**-22 * sizes[0] * sizes[1]
    assert ((activated - defined).abs() <= tolerance).all()


# ---- the thread pool


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(threads, count):
    x, weights = normal(5, 700), [normal(rows, 700, seed=rows) for rows in (500, 64, 65)]
    expected = sums_in_lanes(x, torch.cat(weights))
    threads(count)
    assert _C.threads() == count
    for pause in (0, 0, 0.005, 0):  # workers that spin, and workers that sleep
        time.sleep(pause)
        assert same_bits(native(x, weights), expected)


def test_several_python_threads_may_call_at_once(threads):
    threads(3)
    x, weight = normal(4, 300), normal(400, 300, seed=1)
    expected = sums_in_lanes(x, weight)
    wrong = []

    def call():
        wrong.extend(number for number in range(50) if not same_bits(native(x, [weight]), expected))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells how many threads there are")
def test_a_forked_process_has_its_own_threads(threads):
    threads(3)
    x, weight = normal(4, 300, dtype=F32), normal(400, 300, seed=1, dtype=F32)
    out = torch.zeros(4, 400)
    view = memoryview(out.numpy())
    call = (out.data_ptr(), x.data_ptr(), 4, 300, [(weight.data_ptr(), 400)], CODES[F32])
    _C.linear(*call)
    expected = bytes(view)
    child = os.fork()
    if child == 0:  # without torch, whose threads do not survive a fork
        signal.alarm(20)  # a child that waits for threads that it does not have would wait forever
        out.zero_()
        _C.linear(*call)
        same = bytes(view) == expected
        os._exit(0 if same and len(os.listdir("/proc/self/task")) == _C.threads() == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    _C.linear(*call)
    assert bytes(view) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="there is no affinity")
def test_the_default_is_one_thread_per_usable_cpu():
    code = "from arcmerge import _C; print(_C.threads())"
    allowed = sorted(os.sched_getaffinity(0))
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for cpus in (allowed, allowed[:1]):
        command = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {cpus}); {code}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
        assert int(done.stdout) == len(cpus)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: _C.set_threads(0), "'threads' must be a whole number from 1 to 1024, got 0"),
        (lambda: _C.set_threads(1025), "'threads' must be a whole number from 1 to 1024, got 1025"),
        (lambda: _C.linear(0, 0, 1, 1, [(0, 1)], 1), "'dtype' must be 0 (bf16) or 2 (f32), got 1"),
        (
            lambda: _C.linear(0, 0, 1, 1, [(0, 1), (0, -1)], 0),
            "'count', 'length' and 'rows' must not be negative, got 1, 1 and -1",
        ),
        (
            lambda: _C.linear_geglu(0, 0, -2, 1, 0, 0, 1, 0),
            "'count', 'length' and 'rows' must not be negative, got -2, 1 and 1",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the whole sentence is compared
        call()
    assert str(caught.value) == sentence
