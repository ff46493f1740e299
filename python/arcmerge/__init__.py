"""arcmerge: merges of language models at the speed of the disk.

    arcmerge.merge("recipe.yml", "out/")        a checkpoint from a mergekit configuration
    arcmerge.plan("recipe.yml")                 the decisions of a merge, without merging
    arcmerge.inspect("a/", "b/")                how two models relate, tensor by tensor
    arcmerge.slerp(a, b, 0.3)                   tensors or state dicts in memory
    arcmerge.merge_state_dicts([a, b], ...)     state dicts in memory, by any method
    arcmerge.Gemma2.from_pretrained("out/")     a Gemma-2 that generates and scores

Importing this package imports nothing: each name is imported from its module on first access.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from arcmerge.errors import ArcmergeError
    from arcmerge.gemma2.model import Gemma2
    from arcmerge.merging.merge import merge
    from arcmerge.merging.options import Options
    from arcmerge.merging.preview import inspect, plan
    from arcmerge.merging.report import MergeReport
    from arcmerge.sweeping.sweep import sweep
    from arcmerge.tensors import merge_state_dicts, slerp
    from arcmerge.threads import get_num_threads, set_num_threads

__version__ = "0.1.0"
__all__ = [
    "ArcmergeError",
    "Gemma2",
    "MergeReport",
    "Options",
    "__version__",
    "get_num_threads",
    "inspect",
    "merge",
    "merge_state_dicts",
    "plan",
    "set_num_threads",
    "slerp",
    "sweep",
]

_HOMES = {
    "ArcmergeError": "arcmerge.errors",
    "Gemma2": "arcmerge.gemma2.model",
    "MergeReport": "arcmerge.merging.report",
    "Options": "arcmerge.merging.options",
    "get_num_threads": "arcmerge.threads",
    "inspect": "arcmerge.merging.preview",
    "merge": "arcmerge.merging.merge",
    "merge_state_dicts": "arcmerge.tensors",
    "plan": "arcmerge.merging.preview",
    "set_num_threads": "arcmerge.threads",
    "slerp": "arcmerge.tensors",
    "sweep": "arcmerge.sweeping.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'arcmerge' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
