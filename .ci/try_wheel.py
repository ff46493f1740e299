"""Merges two tiny models with the arcmerge that is installed, and checks the result: what a wheel has to pass.

    python .ci/try_wheel.py

Needs numpy, pyyaml and tokenizers; a merge on the CPU loads neither torch nor triton.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import arcmerge
import tiny


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second = (tiny.make(model, folder) for model in ("gemma-a", "gemma-b"))
        recipe = {
            "merge_method": "slerp",
            "base_model": str(first),
            "models": [{"model": str(first)}, {"model": str(second)}],
            "parameters": {"t": [0, 0.5, 1]},
            "dtype": "bfloat16",
        }
        print(arcmerge.__file__)
        print(arcmerge.merge(recipe, folder / "half", device="cpu"))
        arcmerge.merge({**recipe, "parameters": {"t": 1}}, folder / "end", device="cpu")
        data = [(path / "model.safetensors").read_bytes() for path in (second, folder / "end", folder / "half")]
        contents = [file[8 + int.from_bytes(file[:8], "little") :] for file in data]
        if sorted(contents[0]) != sorted(contents[1]) or contents[2] == contents[1]:
            sys.exit("the merged weights are wrong")
        loaded = {"torch", "triton"} & set(sys.modules)
        if loaded:
            sys.exit(f"a merge on the CPU must load neither torch nor triton, got {', '.join(sorted(loaded))}")


if __name__ == "__main__":
    main()
