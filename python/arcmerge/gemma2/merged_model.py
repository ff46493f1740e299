"""A Gemma-2 that is merged in memory: its parents stay mapped, and a new `t` is one pass over the weights."""

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

from arcmerge.dispatch.checks import ACTIVATIONS
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.config import Gemma2Config
from arcmerge.gemma2.model import Gemma2
from arcmerge.gemma2.runtime.workspace import workspace_bytes
from arcmerge.gemma2.weights import LM_HEAD, STORED_DTYPES, assemble, find_tensors, neighbours
from arcmerge.interrupts import remove_at_end
from arcmerge.merging.execution.in_memory import InMemoryMerge
from arcmerge.merging.merge import merge
from arcmerge.merging.options import Options, Progress, Warn
from arcmerge.merging.output.files import small_files
from arcmerge.merging.prepare import prepare
from arcmerge.merging.recipe.recipe import MergeConfig
from arcmerge.merging.report import MergeReport


class MergedGemma2(Gemma2):
    """A Gemma-2 whose weights are a merge in memory. Create one with `Gemma2.from_merge`.

    On the CPU the parents stay mapped. On a GPU they are in its memory, or, if they do not fit, in pinned memory, from
    which every merge copies them. Their Gram matrices are computed once and stored in a small file next to the first
    parent; their histograms of magnitudes are kept in memory.
    """

    def __init__(
        self, in_memory: InMemoryMerge, config: Gemma2Config, files: Mapping[str, bytes], numerics: str
    ) -> None:
        self._in_memory = in_memory
        # The merge may have a vocabulary of its own, so its config and tokenizer files are written to a folder.
        folder = Path(mkdtemp(prefix="arcmerge-"))
        finalize(self, _remove, folder, remove_at_end(str(folder)), os.getpid())
        for name, content in files.items():
            (folder / name).write_bytes(content)
        stored = find_tensors("the merge", in_memory.outputs, config)
        dtypes = {STORED_DTYPES[in_memory.outputs[name].dtype.name] for name in stored.values()}
        if len(dtypes) > 1 or not dtypes <= set(ACTIVATIONS):
            found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ArcmergeError(
                f"'out_dtype' must be bfloat16 or float32 to run the merge, got {found}; set out_dtype: bfloat16"
            )

        def get(name: str) -> Tensor:
            output = in_memory.outputs[stored[name]]
            return in_memory.tensor(stored[name]).view(STORED_DTYPES[output.dtype.name]).view(output.shape)

        super().__init__(config, assemble(config, get, LM_HEAD in stored), folder, numerics)

    @classmethod
    def open(
        cls,
        config: MergeConfig,
        options: Options,
        numerics: str,
        progress: Progress | None = None,
        warn: Warn = warnings.warn,
    ) -> MergedGemma2:
        """Merge the models of a configuration in memory; see `Gemma2.from_merge`."""
        prepared = prepare(config, options, warn)
        files = small_files(prepared, "merge")
        donor = Path(prepared.plan.donor.path)  # a folder that the user knows, for messages
        model_config = Gemma2Config.read(json.loads(files["config.json"]), donor / "config.json")
        widest = max(STORED_DTYPES.values(), key=lambda dtype: dtype.itemsize)
        stored = {STORED_DTYPES.get(job.output.dtype.name, widest) for job in prepared.plan.jobs}
        workspace = workspace_bytes(model_config, max(stored, key=lambda dtype: dtype.itemsize))
        in_memory = InMemoryMerge(prepared, progress or (lambda done, total: None), neighbours, workspace)
        return cls(in_memory, model_config, files, numerics)

    @property
    def recipe(self) -> str:
        """The merge configuration, as YAML, with the parameters that are currently applied."""
        return self._in_memory.recipe.text

    def set_t(self, t: Any, progress: Progress | None = None) -> int:
        """Merge again with a new `t`; short for `set_parameters(t=t)`.

        Args:
            t: a number, a gradient (a list of numbers over the layers), or a list of `{filter, value}`.
            progress: as in `set_parameters`.

        Returns:
            The number of tensors that were merged again.

        Raises:
            ArcmergeError: see `set_parameters`.

        Example::

            >>> changed = model.set_t([0, 0.7, 1, 0.7, 0])
        """
        return self.set_parameters(t=t, progress=progress)

    def set_parameters(self, *, progress: Progress | None = None, **parameters: Any) -> int:
        """Merge again in place with new parameters. The weights keep their addresses.

        Only tensors whose rules change are merged again. A call starts from the configuration, not from what an
        earlier call has set.

        Args:
            progress: called with the bytes merged so far and in total.
            parameters: of the merge method, by name, each as under `parameters:` in a merge configuration: a number, a
                gradient, or a list of `{filter, value}`. A name alone applies to the whole model, and replaces the
                settings of its name on all levels of the configuration; "weight[1]" or "weight[org/name]" sets that of
                one model, and "t:mlp" or "weight[1]:mlp" that of the tensors whose names contain the text.

        Returns:
            The number of tensors that were merged again.

        Raises:
            ArcmergeError: if a parameter is wrong; the model is unchanged then.

        Example::

            >>> changed = model.set_parameters(t=0.3)
            >>> model.set_parameters(t=0.3)
            0
            >>> changed = model.set_parameters(**{"t:self_attn": 0.5, "t:mlp": [0, 1]})
        """
        with self.network.lock:
            return self._in_memory.set_parameters(parameters, progress or (lambda done, total: None))

    def save(
        self,
        out: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        out_shard_size: str | int = "5B",
        copy_tokenizer: bool = True,
        write_model_card: bool = True,
        allow_nonfinite: bool = False,
        allow_crimes: bool = False,
        unsafe_truncate_embeddings: bool = False,
        transformers_cache: str | None = None,
        random_seed: int | None = None,
        progress: Progress | None = None,
        warn: Warn = warnings.warn,
    ) -> MergeReport:
        """Write the checkpoint folder that `arcmerge merge` writes for `recipe`.

        Args:
            out: the folder; the other arguments are those of `arcmerge.merge`.

        Raises:
            ArcmergeError: see `arcmerge.merge`.

        Example::

            >>> report = model.save("merged/")
        """
        return merge(
            self.recipe,
            out,
            device=device,
            threads=threads,
            out_shard_size=out_shard_size,
            copy_tokenizer=copy_tokenizer,
            write_model_card=write_model_card,
            allow_nonfinite=allow_nonfinite,
            allow_crimes=allow_crimes,
            unsafe_truncate_embeddings=unsafe_truncate_embeddings,
            transformers_cache=transformers_cache,
            random_seed=random_seed,
            progress=progress,
            warn=warn,
        )


def _remove(folder: Path, forget: Callable[[], None], process: int) -> None:
    """Remove the folder, except in a forked process, which has not created it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
        forget()
