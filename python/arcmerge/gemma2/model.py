"""Gemma2: a model as people know it from transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.checkpoint.hub import locate
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.config import Config
from arcmerge.gemma2.generation import Generated, Limits, generate, require_tokens
from arcmerge.gemma2.network import Network
from arcmerge.gemma2.sampling import Sampling
from arcmerge.gemma2.scoring import Score, score
from arcmerge.gemma2.sequences import Sequences
from arcmerge.gemma2.text import Messages, Stream, Text
from arcmerge.gemma2.weights import Weights, load
from arcmerge.merging.options import Options

if TYPE_CHECKING:
    from arcmerge.gemma2.merged import MergedGemma2

NUMERICS = ("default", "hf")
DTYPES = (torch.bfloat16, torch.float32)


class Gemma2:
    """A Gemma-2 that generates and scores. Make one with from_pretrained or from_merge.

    network: from tokens to hidden states. config: as in config.json. ends: the tokens that end an answer.
    """

    def __init__(self, config: Config, weights: Weights, folder: Path, numerics: str = "default") -> None:
        if numerics not in NUMERICS:
            raise ArcmergeError(f"'numerics' must be 'default' or 'hf', is {numerics!r}.")
        self.config = config
        self.network = Network(config, weights, stepwise=numerics == "hf")
        self.ends = _ends(config, folder)
        self._folder = folder
        self._text: Text | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.bfloat16,
        numerics: str = "default",
    ) -> Gemma2:
        """A model from its folder of safetensors, or from the hub by name.

        device: "auto" is the first GPU, or else the CPU. dtype: bfloat16 or float32; weights that are stored in it are
        mapped from the files on the CPU, not read or copied; others are converted. numerics: "default" keeps
        softcaps, RoPE, the residual stream and logits in float32; "hf" rounds to dtype after every step, as
        transformers does, to reproduce its tokens.
        Raises ArcmergeError, in a sentence each, for everything that is wrong with the folder.
        """
        if dtype not in DTYPES:
            raise ArcmergeError(f"'dtype' must be torch.bfloat16 or torch.float32, is {dtype}.")
        device = Options(device=str(device)).resolved_device
        folder = locate(str(path))
        checkpoint = Checkpoint(folder)
        config = Config.read(checkpoint.config, folder / "config.json")
        return cls(config, load(checkpoint, config, dtype, torch.device(device)), folder, numerics)

    @staticmethod
    def from_merge(config: Any, device: str = "auto", numerics: str = "default", **options: Any) -> MergedGemma2:
        """A model that is merged in memory, whose parameters can be changed: see MergedGemma2.

        config: a merge configuration, as a path, YAML text or a mapping. device, numerics: as in from_pretrained.
        options: the fields of `arcmerge.merging.options.Options`, by name; `progress` and `warn` as in
        `arcmerge.merge`.
        Raises ArcmergeError, in a sentence each, for everything that is wrong with the configuration or its models.
        """
        from arcmerge.gemma2.merged import merged

        return merged(config, device, numerics, **options)

    @property
    def device(self) -> torch.device:
        return self.network.weights.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.weights.norm.dtype

    @property
    def text(self) -> Text:
        """The tokenizer, opened when first asked for; raises ArcmergeError if the folder has none."""
        if self._text is None:
            self._text = Text(self._folder, self.config.bos_token_id)
        return self._text

    @torch.inference_mode()
    def logits(self, input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, vocab_size] float32, after the softcap: 4 bytes for every position and word, so for few of them.

        input_ids: [B, T], or a list of token lists, which are padded on the right. attention_mask: [B, T], 1 for
        tokens and 0 for padding, which may be on either side; its logits are 0.
        """
        rows, places, width = _rows(input_ids, attention_mask)
        require_tokens(self.network, [row for row in rows if row])
        out = torch.zeros(len(rows), width, self.config.vocab_size, device=self.device)
        sequences = Sequences(self.network, len(rows), max(map(len, rows)))
        head = self.network.weights.embed_tokens
        for batch, hidden in sequences.feed(rows):
            found = ops.head_logits(hidden, head, self.config.final_logit_softcapping, self.network.stepwise)
            columns = [
                places[row][position]
                for row, position in zip(batch.sequences.tolist(), batch.positions.tolist(), strict=True)
            ]
            out[batch.sequences, torch.tensor(columns, device=self.device)] = found
        return out

    def generate(
        self,
        input_ids: str | Messages | Sequence[int] | Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Iterable[int] | None = None,
        stop: str | Sequence[str] = (),
        stream: Callable[[Any], object] | None = None,
    ) -> Any:
        """Continue a prompt. Greedy unless do_sample; other options as in `Sampling`.

        input_ids: text (a str), a conversation (messages with role and content), token numbers of one prompt (a list),
        or [B, T] with an attention_mask that tells padding. Text gets exactly one BOS.
        eos_token_id: what ends an answer, by default what config.json and generation_config.json list; an empty list
        for nothing. stop: strings that end it and are not part of it. stream: called with each piece of new text, or
        with each new token where tokens were given.

        Returns the answer's text for text and messages; for tokens, the prompt and its answer: a list for a list, for
        [B, T] a tensor in which pad_token_id follows what ended earlier.
        """
        sampling = Sampling(do_sample, repetition_penalty, temperature, top_k, top_p, min_p, seed)
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(stops):
            raise ArcmergeError("'stop' must be strings of one character or more, has an empty one.")
        if eos_token_id is None:
            ends = self.ends
        else:
            ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)

        if isinstance(input_ids, Tensor):
            if stops or (stream is not None and len(input_ids) > 1):
                raise ArcmergeError("'stop' and, for more than one prompt, 'stream' need a single prompt or text.")
            return self._continue(input_ids, attention_mask, sampling, max_new_tokens, ends, stream)
        tokens, is_text = self._tokens(input_ids)
        if not is_text and not stops:
            listen = _listener(stream)
            found = self.run([tokens], sampling, Limits(max_new_tokens, ends, listen))
            return [*tokens, *found.tokens[0]]
        pieces = Stream(self.text, stops)

        def on_token(row: int, token: int) -> bool:
            piece = "" if token in ends else pieces.push(token)
            if stream is not None and (piece or not is_text):
                stream(piece if is_text else token)
            return pieces.stopped

        found = self.run([tokens], sampling, Limits(max_new_tokens, ends, on_token))
        rest = pieces.finish()
        if stream is not None and is_text and rest:
            stream(rest)
        return pieces.whole if is_text else [*tokens, *found.tokens[0]]

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Limits) -> Generated:
        """Continue several prompts of any lengths; with timings."""
        return generate(self.network, prompts, sampling, limits)

    @torch.inference_mode()
    def score(self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """(logprob, is_greedy) of each continuation after its context, both of token numbers.

        An empty context stands for BOS. logprob: natural logarithm of the probability of the whole continuation.
        """
        sequences = [
            ([*(context or [self.config.bos_token_id]), *continuation], len(continuation))
            for context, continuation in ((list(context), list(continuation)) for context, continuation in pairs)
        ]
        return score(self.network, sequences) if sequences else []

    def perplexity(self, text: str | Sequence[int], window: int | None = None) -> float:
        """exp of the mean negative log-probability a token, BOS not counted.

        text: a str, or token numbers. window: a long text is cut into pieces of window - 1 tokens, each scored after a
        BOS of its own; by default the model's max_position_embeddings.
        """
        bos = self.config.bos_token_id
        tokens = self.text.encode(text) if isinstance(text, str) else list(text)
        tokens = tokens[1:] if tokens[:1] == [bos] else tokens
        if not tokens:
            raise ArcmergeError("perplexity needs at least one token beside BOS.")
        size = (window or self.config.max_position_embeddings) - 1
        if size < 1:
            raise ArcmergeError(f"'window' must be 2 or more, is {window}.")
        found = self.score([([bos], tokens[start : start + size]) for start in range(0, len(tokens), size)])
        return math.exp(-sum(one.logprob for one in found) / len(tokens))

    def _tokens(self, prompt: Any) -> tuple[list[int], bool]:
        if isinstance(prompt, str):
            return self.text.encode(prompt), True
        prompt = list(prompt)
        if prompt and isinstance(prompt[0], dict):
            return self.text.chat(prompt), True
        if not all(isinstance(token, int) for token in prompt):
            raise ArcmergeError("a prompt must be text, messages, or token numbers; give several prompts as a tensor.")
        return prompt, False

    def _continue(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        sampling: Sampling,
        max_new_tokens: int,
        ends: set[int],
        stream: Callable[[Any], object] | None,
    ) -> Tensor:
        rows, _, _ = _rows(input_ids, attention_mask)
        found = self.run(rows, sampling, Limits(max_new_tokens, ends, _listener(stream)))
        longest = max(map(len, found.tokens))
        pad = self.config.pad_token_id
        answers = [tokens + [pad] * (longest - len(tokens)) for tokens in found.tokens]
        return torch.cat([input_ids, torch.tensor(answers, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def _listener(stream: Callable[[Any], object] | None) -> Callable[[int, int], bool]:
    def listen(row: int, token: int) -> bool:
        if stream is not None:
            stream(token)
        return False

    return listen


def _rows(
    input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None
) -> tuple[list[list[int]], list[list[int]], int]:
    """Tokens of each row without padding, the columns in which they stood, and the number of columns."""
    if not isinstance(input_ids, Tensor):
        rows = [list(row) for row in input_ids]
        return rows, [list(range(len(row))) for row in rows], max(map(len, rows), default=0)
    if input_ids.dim() != 2:
        raise ArcmergeError(f"'input_ids' must have the shape [batch, tokens], has {list(input_ids.shape)}.")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ArcmergeError(
            f"'attention_mask' must have the shape of 'input_ids' {list(input_ids.shape)}, has {list(mask.shape)}."
        )
    places = [row.nonzero().flatten().tolist() for row in mask]
    rows = [row[place].tolist() for row, place in zip(input_ids.cpu(), places, strict=True)]
    return rows, places, input_ids.shape[1]


def _ends(config: Config, folder: Path) -> set[int]:
    """eos_token_id of both files: instruction-tuned models end a turn with a token that config.json does not name."""
    ends = set(config.eos_token_id)
    path = folder / "generation_config.json"
    if path.exists():
        try:
            listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ArcmergeError(f"{path}: is not a JSON object: copy the base model's or remove it.") from error
        ends |= {token for token in (listed if isinstance(listed, list) else [listed]) if type(token) is int}
    return ends
