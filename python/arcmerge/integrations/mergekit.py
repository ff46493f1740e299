"""mergekit with arcmerge inside: merges that arcmerge does go to its engine, all others to mergekit, unchanged.

python -m arcmerge.integrations.mergekit recipe.yml out/        every flag of mergekit-yaml

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

if __name__ == "__main__":  # what follows takes seconds
    interrupts.end_at_once("nothing was written")

with needed("mergekit", by="arcmerge.integrations.mergekit", extra="mergekit", module=__name__):
    import mergekit.merge
    import mergekit.scripts.run_yaml
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

_theirs = mergekit.merge.run_merge
_log = logging.getLogger(__name__)


def run(
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions | None = None,
    config_source: str | None = None,
) -> None:
    """As mergekit.merge.run_merge: by arcmerge where it can, else by mergekit. The log says which, and why.

    Raises ArcmergeError for what goes wrong in a merge that arcmerge began, whatever mergekit may raise otherwise.
    """
    options = options or MergeOptions()
    text = config_source or str(merge_config.to_yaml())
    if (reason := objection(text, options)) is not None:
        _log.warning("mergekit does this merge itself: %s", reason)
        interrupts.say("what mergekit has written is incomplete")
        _theirs(merge_config, out_path, options, config_source)
        return
    report = merge(text, out_path, warn=_log.warning, **_options(options))
    _log.info("%s", report)


def objection(text: str, options: MergeOptions) -> str | None:
    """Why arcmerge leaves a merge to mergekit; None if it does not. text: the configuration, as YAML."""
    if not options.safe_serialization:
        return "pickled output is asked for"
    try:
        prepare(text, Options.of(_options(options)), lambda sentence: None)
    except ArcmergeError as error:
        return error.problems[0]
    return None


def take_over() -> Undo:
    """Lets mergekit's own functions, and its command in this process, call `run`."""
    undo = Undo()
    for module in (mergekit.merge, mergekit.scripts.run_yaml):
        before = module.run_merge
        module.run_merge = run
        undo.later(lambda module=module, before=before: setattr(module, "run_merge", before))
    return undo


def _options(options: MergeOptions) -> dict[str, Any]:
    """Those that mean something to both."""
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
    }


if __name__ == "__main__":
    with take_over():
        try:
            mergekit.scripts.run_yaml.main()
        except ArcmergeError as error:
            sys.exit(f"arcmerge: {error}")
        except OSError as error:  # of mergekit's own, such as a recipe that is not there
            sys.exit(f"arcmerge: {error.filename or 'the system'}: {error.strerror or error}")
