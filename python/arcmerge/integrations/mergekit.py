"""arcmerge inside mergekit: it runs the merges that it supports; mergekit runs all others, unchanged.

python -m arcmerge.integrations.mergekit recipe.yml out/        with every flag of mergekit-yaml

with take_over():               # programs that call mergekit.merge.run_merge
    ...
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from arcmerge import interrupts
from arcmerge.errors import ArcmergeError, needed
from arcmerge.integrations.undo import Undo
from arcmerge.merging.merge import merge
from arcmerge.merging.options import Options
from arcmerge.merging.prepare import prepare

if __name__ == "__main__":  # the imports below take seconds
    interrupts.end_at_once("nothing was written")

with needed("mergekit", by="arcmerge.integrations.mergekit", extra="mergekit", module=__name__):
    import mergekit.merge
    import mergekit.scripts.run_yaml
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

_run_merge = mergekit.merge.run_merge
_log = logging.getLogger(__name__)


def run(
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions | None = None,
    config_source: str | None = None,
) -> None:
    """Like mergekit.merge.run_merge, by arcmerge if it supports the merge, else by mergekit; the log has the reason.

    Args:
        merge_config, out_path, options, config_source: as in mergekit.

    Raises:
        ArcmergeError: if a merge fails that arcmerge has started.
    """
    options = options or MergeOptions()
    text = config_source or str(merge_config.to_yaml())
    if (reason := unsupported(text, options)) is not None:
        _log.warning("mergekit runs this merge: %s", reason)
        interrupts.say("what mergekit has written is incomplete")
        _run_merge(merge_config, out_path, options, config_source)
        return
    report = merge(text, out_path, warn=_log.warning, **_options(options))
    _log.info("%s", report)


def unsupported(text: str, options: MergeOptions) -> str | None:
    """Why arcmerge does not support a merge, or None if it does; text: the configuration, as YAML."""
    if not options.safe_serialization:
        return "--no-safe-serialization selects pickled output"
    try:
        prepare(text, Options.of(_options(options)), lambda sentence: None)
    except ArcmergeError as error:
        return error.problems[0]
    return None


def take_over() -> Undo:
    """Replace mergekit's run_merge by `run`, for its functions and for its command in this process.

    Returns:
        An Undo, also a context manager.

    Example::

        >>> from arcmerge.integrations.mergekit import take_over
        >>> with take_over():
        ...     pass  # code that calls mergekit.merge.run_merge
    """
    undo = Undo()
    for module in (mergekit.merge, mergekit.scripts.run_yaml):
        original = module.run_merge
        module.run_merge = run
        undo.later(lambda module=module, original=original: setattr(module, "run_merge", original))
    return undo


def _options(options: MergeOptions) -> dict[str, Any]:
    """The options of mergekit that arcmerge has too."""
    cuda = options.cuda or options.gpu_rich
    return {
        "device": "cuda" if cuda else str(options.device or "auto"),
        "threads": options.num_threads,
        "out_shard_size": options.out_shard_size,
        "copy_tokenizer": options.copy_tokenizer,
        "write_model_card": options.write_model_card,
        "allow_crimes": options.allow_crimes,
        "unsafe_truncate_embeddings": options.unsafe_truncate_embeddings,
        "transformers_cache": options.transformers_cache,
        "random_seed": options.random_seed,
    }


if __name__ == "__main__":
    with take_over():
        try:
            mergekit.scripts.run_yaml.main()
        except ArcmergeError as error:
            sys.exit(f"arcmerge: {error}")
        except OSError as error:  # mergekit's own, for example for a missing recipe
            sys.exit(f"arcmerge: {error.filename or 'the system'}: {error.strerror or error}")
