"""Output heads: with any name, tied to the embedding or not, in one model only, or missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import arcmerge
import decoders
from decoders import EMBEDDING, HEAD, TOKENS, WIDTH


@pytest.mark.parametrize("head", ["language_model.lm_head.weight", "embed_out.weight", "output.weight", "head.weight"])
def test_heads_with_any_name_do_not_change_config_json(head: str, tmp_path: Path) -> None:
    a, b = decoders.pair(tmp_path, head=head)
    found, _ = decoders.merge(decoders.slerp(a, b), tmp_path / "out")
    assert head in found
    assert decoders.settings(tmp_path / "out") == decoders.settings(a)


@pytest.mark.parametrize("score", ["score.weight", None])
@pytest.mark.parametrize("tied", [{"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {}])
def test_models_without_a_head_do_not_change_config_json(
    tied: dict[str, bool], score: str | None, tmp_path: Path
) -> None:
    config = {key: value for key, value in decoders.config().items() if key != "tie_word_embeddings"}
    config |= {"architectures": ["LlamaForSequenceClassification" if score else "LlamaModel"], **tied}
    folders = [
        decoders.write(
            tmp_path / letter, decoders.decoder(seed, head=None, more=[(score, (1, WIDTH))] if score else []), config
        )
        for seed, letter in enumerate("ab")
    ]
    found, _ = decoders.merge(decoders.slerp(*folders), tmp_path / "out")
    assert decoders.settings(tmp_path / "out") == config
    assert ("score.weight" in found) == (score is not None)


@pytest.mark.parametrize("head", [HEAD, "language_model.lm_head.weight", "embed_out.weight"])
@pytest.mark.parametrize("of_base", [True, False])
def test_a_head_of_one_model_is_merged_with_the_embedding_of_the_other(
    head: str, of_base: bool, tmp_path: Path
) -> None:
    tied = decoders.write(tmp_path / "tied", decoders.decoder(1, head=None), decoders.config(tie_word_embeddings=True))
    own = decoders.write(tmp_path / "own", decoders.decoder(2, head=head), decoders.config())
    config = decoders.slerp(*([own, tied] if of_base else [tied, own]), merge_method="linear", parameters={"weight": 1})
    found, _ = decoders.merge(config, tmp_path / "out")
    expected = (decoders.weights(tied)[EMBEDDING].float() + decoders.weights(own)[head].float()) / 2
    torch.testing.assert_close(found[head].float(), expected, rtol=2**-7, atol=0)
    assert decoders.settings(tmp_path / "out")["tie_word_embeddings"] is False


def test_a_score_or_a_head_with_an_unknown_name_is_not_a_missing_head(tmp_path: Path) -> None:
    for name, shape in (("score.weight", (1, WIDTH)), ("model.to_logits.weight", (TOKENS, WIDTH))):
        a, b = decoders.pair(tmp_path / name, head=None, more=[(name, shape)])
        found, _ = decoders.merge(decoders.slerp(a, b), tmp_path / name / "out")
        assert name in found
        assert decoders.settings(tmp_path / name / "out") == decoders.settings(a)


def test_the_key_is_added_only_if_the_merge_makes_the_head(tmp_path: Path) -> None:
    silent = {key: value for key, value in decoders.config().items() if key != "tie_word_embeddings"}
    tied = decoders.write(tmp_path / "tied", decoders.decoder(1, head=None), silent)
    own = decoders.write(tmp_path / "own", decoders.decoder(2), silent)
    decoders.merge(decoders.slerp(tied, own), tmp_path / "made")
    decoders.merge(decoders.slerp(own, tied), tmp_path / "kept")
    assert decoders.settings(tmp_path / "made") == {**silent, "tie_word_embeddings": False}
    assert decoders.settings(tmp_path / "kept") == silent


def test_heads_of_models_that_are_all_tied_do_not_change_the_key(tmp_path: Path) -> None:
    """BigBird-Pegasus: its class ties nothing, whatever its config.json has."""
    said = decoders.config(tie_word_embeddings=True)
    a, b = (decoders.write(tmp_path / letter, decoders.decoder(seed), said) for seed, letter in enumerate("ab"))
    own = decoders.write(tmp_path / "own", decoders.decoder(2), decoders.config())
    for other, tied in ((b, True), (own, False)):
        found, _ = decoders.merge(decoders.slerp(a, other), out := tmp_path / f"out-{tied}")
        assert HEAD in found
        assert decoders.settings(out)["tie_word_embeddings"] is tied


def test_the_head_after_a_slice_of_a_tied_model_is_that_models_embedding(tmp_path: Path) -> None:
    """The embedding of the first slice is from a model with its own head and was not trained as a head."""
    own = decoders.write(tmp_path / "own", decoders.decoder(2), decoders.config())
    tied = decoders.write(tmp_path / "tied", decoders.decoder(1, head=None), decoders.config(tie_word_embeddings=True))
    for base in (own, tied):
        out = tmp_path / f"out-{base.name}"
        found, _ = decoders.merge({**decoders.slices((own, 0, 2), (tied, 2, 4)), "base_model": str(base)}, out)
        assert torch.equal(found[HEAD], decoders.weights(tied)[EMBEDDING])
        assert torch.equal(found[EMBEDDING], decoders.weights(own)[EMBEDDING])
        assert decoders.settings(out)["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    "architecture",
    [
        "LlamaForSequenceClassification",
        "BertForTokenClassification",
        "GPT2ForQuestionAnswering",
        "BertForMultipleChoice",
    ],
)
def test_a_missing_task_head_is_refused(architecture: str, tmp_path: Path) -> None:
    config = decoders.config(architectures=[architecture], tie_word_embeddings=True)
    a, b = (decoders.write(tmp_path / letter, decoders.decoder(n, head=None), config) for n, letter in enumerate("ab"))
    with pytest.raises(arcmerge.ArcmergeError, match=rf"must have a head, .* says {architecture}, got none"):
        arcmerge.merge(decoders.slerp(a, b), tmp_path / "out")
    more = [("qa_outputs.weight", (2, WIDTH))]
    whole = [
        decoders.write(tmp_path / f"whole-{letter}", decoders.decoder(n, head=None, more=more), config)
        for n, letter in enumerate("ab")
    ]
    assert "qa_outputs.weight" in decoders.merge(decoders.slerp(*whole), tmp_path / "out")[0]


@pytest.mark.parametrize("nested", [False, True])
def test_a_missing_head_is_refused(nested: bool, tmp_path: Path) -> None:
    a, _ = decoders.pair(tmp_path)
    config = decoders.config()
    if nested:
        config["text_config"] = {"tie_word_embeddings": config.pop("tie_word_embeddings"), "num_hidden_layers": 4}
    lost = decoders.write(tmp_path / "lost", decoders.decoder(3, head=None), config)
    with pytest.raises(
        arcmerge.ArcmergeError,
        match=r"lost must have an output head, 'lm_head.*LlamaForCausalLM with tie.*, got none",
    ):
        arcmerge.merge(decoders.slerp(a, lost), tmp_path / "out")
    assert not (tmp_path / "out").exists()
