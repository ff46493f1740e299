"""All measurements of a GPU, in one run of less than ten minutes, without a network.

    python -m benchmarks.gpu                      on the GPU
    python -m benchmarks.gpu --instrument consan  the tests alone, with kernels that Triton compiles with its checks
    python -m benchmarks.gpu --dry                without a GPU, on tiny shapes in the interpreter, to test all parts

In this order, each part with a share of the time: tests of every kernel against the truth, the roofs of this GPU, every
launch that a Gemma-2 makes, and attention by flash-attn and FlashInfer if they are installed, a merge of resident 2.6B
models, prefill and decoding of one with random weights, tests of a kernel of each op under compute-sanitizer if it is
installed. Failures are recorded and the rest goes on; parts for which there is no time are listed. Exits with 1 if
anything failed.

Prints a table and writes JSON:

    environment   device, capability, multiprocessors, memory_bytes, driver, cuda, torch, triton, python, machine,
                  versions, commit, date; dry: whether it was a dry run, which measures nothing
    tests         passed: how many; failed: [{test, error}]; unfinished: why some did not run, or null
    roofs         bandwidth: bytes a second, the better of copy and read; matmul: operations a second in bfloat16
    predicted_for the machine of results/proof.json that has the name of this GPU; null if none has
    measurements  [{section, op, case, seconds, p20, p80, repetitions, bytes, operations, bytes_per_second,
                  operations_per_second, fraction, predicted_seconds, measured_over_predicted, tokens_per_second}]
                  section: roofs, kernels, merge, prefill or decode. seconds: the median. fraction: of the roof, the
                  minimum time that bytes and operations allow over the time measured. The last three may be absent.
    sanitizer     for each tool of compute-sanitizer what tests has; unfinished: also what the tool found
    not_installed  programs and packages that would be used
    launches_per_layer  kernels of a decoding step for each layer, null if they were not counted
    failures      [{section, op, case, error}]
    not_reached   [{section, op, case}], for which there was no time
    seconds       of the whole run
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.kernel_tests import INSTRUMENTATION

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests and times everything on the GPU of this machine.")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter, to try this program out")
    parser.add_argument("--out", type=Path, help="the JSON file; else benchmarks/results/gpu-<device>[-<mode>].json")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit; the rest is left out")
    parser.add_argument("--instrument", choices=INSTRUMENTATION, help="run the tests alone, in this mode of Triton")
    arguments = parser.parse_args()
    if arguments.dry:
        # Before triton is imported, here and in every process that follows.
        os.environ |= {"ARCMERGE_DRY": "1", "TRITON_INTERPRET": "1", "ARCMERGE_BACKEND": "triton"}

    import torch

    if arguments.instrument and not find_spec(INSTRUMENTATION[arguments.instrument]):
        parser.error(f"this version of triton has no {arguments.instrument}")
    if not arguments.dry and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU; --dry runs without one")
    from benchmarks.gpu.run import run
    from benchmarks.gpu.table import print_report

    report = run(60 * arguments.minutes, arguments.instrument)
    name = f"{report.environment.get('device', 'unknown')} {arguments.instrument or ''}"
    out = arguments.out or _place(name, arguments.dry)
    out.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    print_report(report)
    print(f"written: {out}")
    return 1 if report.failures else 0


def _place(name: str, dry: bool) -> Path:
    import tempfile

    if dry:
        return Path(tempfile.mkdtemp()) / "gpu-dry.json"
    return ROOT / "benchmarks" / "results" / f"gpu-{'-'.join(name.lower().split())}.json"


if __name__ == "__main__":
    sys.exit(main())
