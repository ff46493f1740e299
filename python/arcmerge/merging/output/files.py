"""The small files of the result: config.json, tokenizer, chat template, code, model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from arcmerge.checkpoint.header import parse_object
from arcmerge.dtypes import F32, DType
from arcmerge.merging.output.chat_template import find_template, with_template
from arcmerge.merging.output.config_json import output_config
from arcmerge.merging.output.donor_files import donor_files
from arcmerge.merging.output.model_card import model_card
from arcmerge.merging.plan.plan import Plan
from arcmerge.merging.prepare import Prepared


def small_files(prepared: Prepared, name: str) -> dict[str, bytes]:
    """Make every file of the result except the weights.

    Args:
        prepared: the merge.
        name: name of the result in the model card.

    Returns:
        The contents of the files by name.
    """
    recipe, plan, vocabulary, options = prepared.recipe, prepared.plan, prepared.vocabulary, prepared.options
    donor = prepared.checkpoints[plan.donor]
    files = donor_files(donor.folder, tokenizer=options.copy_tokenizer and vocabulary is None)
    config = donor.config
    if vocabulary is not None:
        files.update(vocabulary.files)
        config = vocabulary.renumbered(config)
        if "generation_config.json" in files:
            path = donor.folder / "generation_config.json"
            files[path.name] = _json(vocabulary.renumbered(parse_object(files[path.name], path)))
    if recipe.chat_template:
        folders = [checkpoint.folder for checkpoint in prepared.checkpoints.values()]
        if template := find_template(recipe.chat_template, folders):
            files = with_template(files, template)
    files["config.json"] = _json(
        output_config(
            config,
            [layer for _, layer in plan.source_layers],
            dtype=_most_common_dtype(plan),
            models=[prepared.checkpoints[model].config for model, _ in plan.source_layers],
            depth=plan.depth,
            vocab_size=plan.vocab_size,
            tied=plan.tied,
        )
    )
    files.update(prepared.code)
    if options.write_model_card:
        card = model_card(name, plan.method.title, recipe.models, recipe.base_model, recipe.text, plan.seed)
        files["README.md"] = card.encode()
        files["mergekit_config.yml"] = recipe.text.encode()
    return files


def _most_common_dtype(plan: Plan) -> DType:
    """The dtype of most bytes: a few tensors of a bfloat16 model may be float32."""
    sizes: Counter[DType] = Counter()
    for job in plan.jobs:
        if job.output.dtype.mergeable:
            sizes[job.output.dtype] += job.output.nbytes
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype.itemsize), default=F32)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
