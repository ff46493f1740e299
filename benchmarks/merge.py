"""Merge two 2.6B checkpoints with arcmerge and mergekit, compared with cp and dd.

    python benchmarks/merge.py                    makes the pair in .bench/ (10.5 GB) the first time; needs 16 GB there
    python benchmarks/merge.py --tiny             tries everything out on tiny models and records nothing

Before each run the last output is removed, dirty pages are written back, and both inputs are read once, so that every
provider starts with the same warm inputs and an idle disk. arcmerge's result is durable when the command returns and
so is that of "cp and sync"; mergekit and cp leave theirs in the page cache. dd writes as many zero bytes as the output
has, past the page cache: what the disk takes if nothing else is done.

Nothing is recorded unless arcmerge and mergekit, run on the same recipe, agree on the start of every tensor.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from _bench import Usage, append, interleaved, provenance, run_process, warm
from arcmerge.checkpoint.header import read_header
from full_size_pair import TINY, Geometry, make_pair, to_f32

SCRIPTS = Path(sysconfig.get_path("scripts"))
ROUNDS = 3
SAMPLE = 4096
# One bf16 ulp is 2^-8 to 2^-7 of a value. mergekit's float32 norms put 0.3 % of the values one ulp off: 2e-4 in L2.
AGREEMENT = 1e-3

RECIPE = """\
models:
  - model: {a}
  - model: {b}
merge_method: slerp
base_model: {b}
dtype: bfloat16
parameters:
  t: {t}
"""


@dataclass(frozen=True)
class Provider:
    """A command that writes `out`. `merges` tells whether it merges or only copies."""

    name: str
    command: Sequence[str]
    out: Path
    merges: bool = False


def providers(folder: Path, a: Path, recipe: Path, byte_count: int) -> list[Provider]:
    out = folder / "out"
    return [
        Provider("arcmerge", [f"{SCRIPTS}/arcmerge", "merge", f"{recipe}", f"{out}"], out, merges=True),
        Provider("mergekit", [f"{SCRIPTS}/mergekit-yaml", f"{recipe}", f"{out}"], out, merges=True),
        Provider("cp", ["cp", "-r", f"{a}", f"{out}"], out),
        Provider("cp and sync", ["bash", "-c", 'cp -r "$0" "$1" && sync', f"{a}", f"{out}"], out),
        Provider(
            "dd",
            ["dd", "if=/dev/zero", f"of={out}", "bs=4M", f"count={byte_count}", "iflag=count_bytes", "oflag=direct"],
            out,
        ),
    ]


def sample(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The first values of every bf16 tensor of a checkpoint."""
    values = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        for name, tensor in read_header(path).items():
            byte_count = min(tensor.nbytes, 2 * SAMPLE)
            values[name] = to_f32(data[tensor.offset : tensor.offset + byte_count].view(np.uint16))
    return values


def check_agreement(samples: Mapping[str, Mapping[str, npt.NDArray[np.float32]]]) -> None:
    """Raises SystemExit if two providers wrote different tensors, or values that differ in more than rounding."""
    if len(samples) < 2:
        return
    (first, ours), (second, theirs) = samples.items()
    if ours.keys() != theirs.keys():
        sys.exit(f"{first} and {second} disagree on the tensors: {sorted(ours.keys() ^ theirs.keys())}")
    for name, values in ours.items():
        error = np.linalg.norm(values - theirs[name]) / np.linalg.norm(values)
        if not error <= AGREEMENT:
            sys.exit(f"{first} and {second} disagree on {name} by {error:.1e} of its length; nothing was recorded")


def measure(provider: Provider, inputs: Sequence[Path]) -> Usage:
    """One timed run, with an idle disk and inputs in the page cache."""
    remove(provider.out)
    os.sync()
    warm(inputs)
    return run_process(provider.command, {**os.environ, "HF_HUB_OFFLINE": "1"})


def remove(out: Path) -> None:
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, as in /proc/mounts."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(mount, kind) for mount, kind in mounts if folder.resolve().is_relative_to(mount)]
    return max(inside, key=lambda entry: len(entry[0]))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where the pair and the outputs lie")
    parser.add_argument("--tiny", action="store_true", help="tiny models; nothing is recorded")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each provider (default {ROUNDS})")
    parser.add_argument("--only", nargs="+", metavar="PROVIDER", help="these alone; nothing is recorded")
    arguments = parser.parse_args()

    model = "tiny" if arguments.tiny else "2.6B"
    folder = arguments.folder.resolve() / model
    a, b = make_pair(folder, TINY if arguments.tiny else Geometry())
    recipe = folder / "recipe.yml"
    recipe.write_text(RECIPE.format(a=a, b=b, t=[0, 0.5, 1, 0.5, 0]))
    inputs = sorted([*a.glob("*.safetensors"), *b.glob("*.safetensors")])
    byte_count = sum(path.stat().st_size for path in a.glob("*.safetensors"))
    chosen = [one for one in providers(folder, a, recipe, byte_count) if one.name in (arguments.only or one.name)]

    origin = {**provenance("arcmerge", "mergekit", "torch"), "file_system": file_system(folder)}
    rows, samples = [], {}
    for number, provider in interleaved(chosen, arguments.rounds):
        usage = measure(provider, inputs)
        if provider.merges:
            samples[provider.name] = sample(provider.out)
        remove(provider.out)
        print(f"round {number + 1}  {provider.name:<12}{usage.seconds:8.2f} s", flush=True)
        rows.append(
            {
                **origin,
                "model": model,
                "provider": provider.name,
                "bytes": byte_count,
                "seconds": round(usage.seconds, 3),
                "cpu_seconds": round(usage.cpu_seconds, 2),
                "peak_anonymous_mb": round(usage.peak_anonymous_mb),
            }
        )
    check_agreement(samples)

    for provider in chosen:
        mine = [row for row in rows if row["provider"] == provider.name]
        medians = [statistics.median(row[key] for row in mine) for key in ("seconds", "cpu_seconds")]
        print(f"{provider.name:<12}{medians[0]:8.2f} s wall{medians[1]:8.2f} s CPU")
    if not arguments.tiny and not arguments.only:
        print(f"recorded in {append('merge', rows)}")


if __name__ == "__main__":
    main()
