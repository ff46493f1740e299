"""The rows of common vocabularies against those that mergekit assembles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.tokenizer_block import ModelToken, TokenizerRecipe, TokenRule
from vocabularies import Model, ThreeModels, aligned

RULES = {
    "plain": {},
    "force": {"a": ("chat", True), "<eos>": ("zero", True)},
    "not-forced": {"b": ("chat", False), "<chat>": ("zero", False)},
    "model-token": {"<new>": ("<end>", False), "c": ("<chat>", True)},
}


class TestAgainstMergekit(ThreeModels):
    """The same rows for every token in every model. Means are close: mergekit sums them in the stored dtype."""

    @pytest.mark.parametrize(
        ("source", "rules"),
        # With a token that the base does not have, mergekit 0.1.5 raises KeyError for `source: base`.
        [(s, r) for s in ("union", "base", "chat") for r in RULES if s != "base" or r in ("plain", "force")],
    )
    @pytest.mark.parametrize("multiple", [None, 16])
    def test_rows(self, base: Model, chat: Model, code: Model, source: str, rules: str, multiple: int | None) -> None:
        ours_source: Any = chat.reference if source == "chat" else source
        recipe = TokenizerRecipe(ours_source, read_rules(RULES[rules], chat), multiple)
        vocabulary, ours = aligned(recipe, base, chat, code)
        ids, theirs = mergekit_rows(recipe, base, chat, code)
        assert ids.keys() == vocabulary.ids.keys()
        for model, our_rows, their_rows in zip((base, chat, code), ours, theirs, strict=True):
            assert our_rows.shape == their_rows.shape
            for token, number in vocabulary.ids.items():
                mean = token == "<end>" or token == "cd"
                # One unit in the last of 8 bits of values below 8: rounded sums, then rounded quotients.
                atol = 2**-5 if mean else 0.0
                np.testing.assert_allclose(
                    our_rows[number],
                    their_rows[ids[token]],
                    rtol=0,
                    atol=atol,
                    err_msg=f"{token} in {model.folder.name}",
                )
            padding = our_rows[len(ids) :]
            # The mean of about 20 rows of size 1 is below 2, so its last of 8 bits is at most 2^-7.
            np.testing.assert_allclose(padding, their_rows[len(ids) :], rtol=0, atol=2**-7)
        in_common = base.tokens if source != "chat" else chat.tokens
        assert [vocabulary.ids[token] for token in in_common] == [ids[token] for token in in_common]


def read_rules(rules: Mapping[str, tuple[str, bool]], chat: Model) -> dict[str, TokenRule]:
    sources: dict[str, Any] = {"zero": "zero", "chat": chat.reference}
    return {
        token: TokenRule(sources.get(source, ModelToken(chat.reference, token=source)), force)
        for token, (source, force) in rules.items()
    }


def mergekit_rows(recipe: TokenizerRecipe, *models: Model) -> tuple[dict[str, int], list[NDArray[np.float64]]]:
    """mergekit's result: the ids of its tokens, and the rows of each model."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("mergekit")
    from mergekit.common import ModelReference as Reference
    from mergekit.tokenizer.build import build_tokenizer
    from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig, ZeroEmbedding
    from mergekit.tokenizer.embed import PermutedVocabulary

    def reference(model: ModelReference) -> Any:
        return Reference.model_validate({"model": {"path": model.path}})

    def rule(own: TokenRule) -> Any:
        if isinstance(own.source, ModelToken):
            wanted = own.source
            source: Any = ModelTokenEmbedding(
                kind="model_token", model=reference(wanted.model), token=wanted.token, token_id=wanted.token_id
            )
        elif isinstance(own.source, ModelReference):
            source = reference(own.source)
        else:
            source = ZeroEmbedding(kind="zero")
        return TokenEmbeddingConfig(source=source, force=own.force)

    references = [reference(model.reference) for model in models]
    info = build_tokenizer(
        references[0],
        references,
        recipe.source if isinstance(recipe.source, str) else reference(recipe.source),
        trust_remote_code=False,
        add_tokens=list(recipe.tokens),
    )
    task = PermutedVocabulary.model_construct(
        gather_tensors=None,
        tokenizer_task=None,
        tokens={token: rule(own) for token, own in recipe.tokens.items()},
        pad_to_multiple_of=recipe.pad_to_multiple_of,
        base_model=references[0],
        vocabulary_axis=0,
    )
    tensors = {name: torch.from_numpy(model.values).bfloat16() for name, model in zip(references, models, strict=True)}
    rows = task.execute(tokenizer_info=info, tensors=tensors)
    return info.tokenizer.get_vocab(), [rows[name].double().numpy() for name in references]
