"""A Gemma-2 that is merged where it runs: its parents stay, and another `t` is one pass over the weights."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

from torch import Tensor

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.arguments import RUNS_IN
from arcmerge.gemma2.config import Gemma2Config
from arcmerge.gemma2.model import Gemma2
from arcmerge.gemma2.weights import DTYPES as STORED
from arcmerge.gemma2.weights import HEAD, assemble, find_tensors
from arcmerge.interrupts import remove_at_end
from arcmerge.merging.execution.in_memory import InMemoryMerge
from arcmerge.merging.merge import merge
from arcmerge.merging.options import Options, Progress, Warn
from arcmerge.merging.output.files import small_files
from arcmerge.merging.prepare import prepare
from arcmerge.merging.recipe.recipe import MergeConfig
from arcmerge.merging.report import MergeReport


class MergedGemma2(Gemma2):
    """A Gemma-2 whose weights are a merge in memory. Make one with Gemma2.from_merge.

    On the CPU the parents stay mapped; on a GPU they lie in its memory, or where they do not fit, in pinned memory from
    which they pass it at every merge. Their Gram matrices are computed once and kept in a small file beside the first.
    """

    def __init__(self, resident: InMemoryMerge, numerics: str) -> None:
        self._resident = resident
        # A vocabulary may be one that only this merge has, so the files that describe it are made as for a folder.
        folder = Path(mkdtemp(prefix="arcmerge-"))
        finalize(self, _remove, folder, remove_at_end(str(folder)), os.getpid())
        for name, content in small_files(resident.prepared, folder.name).items():
            (folder / name).write_bytes(content)
        donor = Path(resident.prepared.plan.donor.path)  # a folder that the user knows
        config = Gemma2Config.read(json.loads((folder / "config.json").read_bytes()), donor / "config.json")
        stored = find_tensors("the merge", resident.outputs, config)
        dtypes = {STORED[resident.outputs[name].dtype.name] for name in stored.values()}
        if len(dtypes) > 1 or not dtypes <= set(RUNS_IN.values()):
            found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ArcmergeError(
                f"a model runs in bfloat16 or in float32, the merge gives {found}; set out_dtype: bfloat16"
            )

        def get(name: str) -> Tensor:
            output = resident.outputs[stored[name]]
            return resident.tensor(stored[name]).view(STORED[output.dtype.name]).view(output.shape)

        super().__init__(config, assemble(config, get, HEAD in stored), folder, numerics)

    @property
    def recipe(self) -> str:
        """The merge configuration, as YAML, by which the weights are merged now."""
        return self._resident.recipe.text

    def set_t(self, t: Any, progress: Progress | None = None) -> int:
        """Merge again with another `t`, in place: the weights keep their addresses.

        t: a number, a gradient (a list of numbers over the layers), or a list of `{filter, value}`, as under
        `parameters:` in a merge configuration; or a mapping of several parameters by name, for methods that have
        others. They hold for all of the model, in place of wherever the configuration set them; all others are as it
        set them, whatever was set since. Only tensors whose coefficients change are merged again. progress: told of
        the bytes done, and of all.

        Returns how many tensors were. Raises ArcmergeError for parameters that are wrong, and leaves all as it is.
        """
        rule = isinstance(t, Mapping) and t.keys() <= {"filter", "value"}
        parameters = t if isinstance(t, Mapping) and not rule else {"t": t}
        with self.network.lock:
            return self._resident.set_parameters(parameters, progress or (lambda done, total: None))

    def save(self, out: str | Path, **options: Any) -> MergeReport:
        """Write the checkpoint folder that `arcmerge merge` writes for `recipe`. options: as of `arcmerge.merge`."""
        return merge(self.recipe, out, **{"device": "cpu", **options})


def _remove(folder: Path, forget: Callable[[], None], process: int) -> None:
    """A forked process leaves the folder to the one that made it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
        forget()


def merged(
    config: MergeConfig,
    device: str,
    numerics: str,
    *,
    progress: Progress | None = None,
    warn: Warn = warnings.warn,
    **options: Any,
) -> MergedGemma2:
    """As Gemma2.from_merge says."""
    chosen = Options.of({**options, "device": device})
    return MergedGemma2(InMemoryMerge(prepare(config, chosen, warn), progress or (lambda done, total: None)), numerics)
