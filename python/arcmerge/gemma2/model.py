"""Gemma2: a model as people know it from transformers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.checkpoint.hub import locate
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.arguments import plain, read_device, read_dtype, read_strings, read_tokens, read_whole
from arcmerge.gemma2.config import Gemma2Config
from arcmerge.gemma2.generation.generate import Generated, StoppingCriteria, generate, require_tokens
from arcmerge.gemma2.generation.generation_config import GenerationConfig
from arcmerge.gemma2.generation.loglikelihood import Score, score
from arcmerge.gemma2.generation.sampler import SamplingParams
from arcmerge.gemma2.generation.text_generation import answer
from arcmerge.gemma2.runtime.network import Network
from arcmerge.gemma2.runtime.runner import Runner
from arcmerge.gemma2.text.prompts import Prompts, read_row
from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer
from arcmerge.gemma2.weights import Weights, load, stored_dtype

if TYPE_CHECKING:
    from arcmerge.gemma2.merged_model import MergedGemma2

NUMERICS = ("default", "hf")


class Gemma2:
    """A Gemma-2 that generates and scores. Make one with from_pretrained or from_merge.

    network: from tokens to hidden states. config: as in config.json. generation_config: as in
    generation_config.json. ends: the tokens that end an answer: eos_token_id of generation_config.json, or else of
    config.json. last_seed: of the last call of generate that drew tokens; None before one.
    Threads may share a model: their calls run one after another, a `stream` included. A process that is forked may go
    on with it, on the CPU.
    """

    def __init__(self, config: Gemma2Config, weights: Weights, folder: Path, numerics: str = "default") -> None:
        if numerics not in NUMERICS:
            raise ArcmergeError(f"'numerics' must be 'default' or 'hf', is {numerics!r}.")
        self.config = config
        self.network = Network(config, weights, stepwise=numerics == "hf")
        self.generation_config = GenerationConfig.read(folder)
        ends = self.generation_config.eos_token_id
        self.ends = set(config.eos_token_id if ends is None else ends)
        self.last_seed: int | None = None
        self._folder = folder
        self._text: Gemma2Tokenizer | None = None

    def __reduce__(self) -> NoReturn:
        raise ArcmergeError(
            "a Gemma2 cannot be copied or pickled, as its weights are mapped from files: open the model with "
            "Gemma2.from_pretrained in every process that needs it."
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | int | None = "auto",
        dtype: str | torch.dtype | None = torch.bfloat16,
        numerics: str | None = "default",
        revision: str | None = None,
    ) -> Gemma2:
        """A model from its folder of safetensors, or from the hub by name.

        device: "auto" is the first GPU, or else the CPU; a number is that of a GPU. dtype: bfloat16 or float32, of
        torch or by name, or "auto", in which most bytes are stored, float32 for float16; weights that are stored in it
        are mapped from the files on the CPU, not read or copied; others are converted. numerics: "default" keeps
        softcaps, RoPE, the residual stream and logits in float32; "hf" rounds to dtype after every step, as
        transformers does, to reproduce its tokens. revision: branch, tag or commit on the hub.
        Raises ArcmergeError, in a sentence each, for everything that is wrong with the folder.
        """
        on = torch.device(read_device(device))
        read_dtype(dtype, "bfloat16")
        folder = locate(str(path), revision)
        checkpoint = Checkpoint(folder)
        config = Gemma2Config.read(checkpoint.config, folder / "config.json")
        weights = load(checkpoint, config, read_dtype(dtype, stored_dtype(checkpoint)), on)
        return cls(config, weights, folder, numerics or "default")

    @staticmethod
    def from_merge(
        config: Any,
        device: str | torch.device | int | None = "auto",
        numerics: str | None = "default",
        **options: Any,
    ) -> MergedGemma2:
        """A model that is merged in memory, whose parameters can be changed: see MergedGemma2.

        config: a merge configuration, as a path, YAML text or a mapping. device, numerics: as in from_pretrained.
        options: the fields of `arcmerge.merging.options.Options`, by name; `progress` and `warn` as in
        `arcmerge.merge`.
        Raises ArcmergeError, in a sentence each, for everything that is wrong with the configuration or its models.
        """
        from arcmerge.gemma2.merged_model import merged

        return merged(config, read_device(device), numerics or "default", **options)

    @property
    def device(self) -> torch.device:
        return self.network.weights.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.weights.norm.dtype

    @property
    def text(self) -> Gemma2Tokenizer:
        """The tokenizer, opened when first asked for; raises ArcmergeError if the folder has none."""
        if self._text is None:
            self._text = Gemma2Tokenizer(self._folder, self.config.bos_token_id)
        return self._text

    @torch.inference_mode()
    def logits(self, input_ids: Any, attention_mask: Any = None) -> Tensor:
        """[B, T, vocab_size] float32, after the softcap: 4 bytes for every position and word, so for few of them.

        input_ids, attention_mask: as in generate; a list of token lists is padded on the right. The logits of padding
        are 0.
        """
        prompts = Prompts.read(input_ids, attention_mask, lambda: self.text)
        rows = prompts.rows
        require_tokens(self.network, [row for row in rows if row])
        out = torch.zeros(len(rows), prompts.width, self.config.vocab_size, device=self.device)
        sequences = Runner(self.network, len(rows), max(map(len, rows)))
        head = self.network.weights.head
        with self.network.lock:
            for batch, hidden in sequences.feed(rows):
                found = ops.lm_head_logits(
                    hidden, head, softcap=self.config.final_logit_softcapping, stepwise=self.network.stepwise
                )
                columns = [
                    prompts.places[row][position]
                    for row, position in zip(batch.sequences.tolist(), batch.positions.tolist(), strict=True)
                ]
                out[batch.sequences, torch.tensor(columns, device=self.device)] = found
        self.network.weights.require_read()
        return out

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        pad_token_id: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: Callable[[Any], object] | None = None,
    ) -> Any:
        """Generate the continuation of one prompt or of several.

        An option that is None has the value of generation_config.json, or else the default of `SamplingParams`.

        Args:
            input_ids: text (a str), a conversation (a list of messages with role and content), or token ids (a list, an
                array or a tensor [T]); or several prompts: a list of one of these kinds, or token ids [B, T]. The
                result of a tokenizer of transformers is accepted. Text gets exactly one BOS.
            attention_mask: [B, T], 0 for padding, on either side. For token ids only.
            max_new_tokens: the most tokens of an answer, 256 by default. An answer that reaches the model's
                max_position_embeddings ends there, with a warning.
            max_length: the most tokens of prompt and answer together; used where max_new_tokens is not given.
            do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in `SamplingParams`.
            seed: of the random numbers. None takes another for every call from torch's generator; `last_seed` holds it.
            eos_token_id: the token ids that end an answer, `ends` by default; an empty list for none. The answer to a
                conversation also ends where the chat template ends a turn.
            pad_token_id: follows the shorter answers of a batch [B, T].
            stop: strings that end an answer and are not part of it. Special tokens count, as "<end_of_turn>".
            stream: called with each piece of new text, or with each new token id where token ids were given. For one
                prompt only.

        Returns:
            The text of the answer for text and conversations. For token ids, prompt and answer together in the form of
            `input_ids`: a list, an array or a tensor. A list of these for a list of prompts.

        Raises:
            ArcmergeError: if an argument has another form or value, or if a prompt has more tokens than the model's
                max_position_embeddings.

        Example::

            model.generate("The capital of France is", max_new_tokens=8)
            model.generate([{"role": "user", "content": "Hello"}], do_sample=True, seed=1)
            model.generate(**tokenizer(["One", "Two"], return_tensors="pt", padding=True))
        """
        config = self.generation_config.changed(
            {
                "max_new_tokens": max_new_tokens,
                "max_length": max_length,
                "do_sample": do_sample,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "pad_token_id": pad_token_id,
            }
        )
        sampling = config.sampling(None if seed is None else read_whole("seed", seed))
        stops = read_strings("stop", (config.stop_strings or ()) if stop is None else stop)
        prompts = Prompts.read(input_ids, attention_mask, lambda: self.text)
        if stream is not None and len(prompts.rows) > 1:
            raise ArcmergeError(f"'stream' must be left out for several prompts, got {len(prompts.rows)} prompts.")
        ends = self.ends if eos_token_id is None else set(read_tokens("eos_token_id", eos_token_id))
        if prompts.is_chat and eos_token_id is None:
            ends = ends | self.text.ends_of_turn
        on_token = _listener(None if prompts.is_text else stream)
        limits = StoppingCriteria(config.new_tokens_after(prompts.width), ends, on_token)
        texts: Sequence[str] = ()
        if prompts.is_text or stops:
            show = stream if prompts.is_text and stream is not None else lambda piece: None
            answers = answer(
                self.network, self.text, prompts.rows, sampling, limits, stops, lambda _, piece: show(piece)
            )
            found, texts = answers.generated, answers.texts
        else:
            found = self.run(prompts.rows, sampling, limits)
        if found.cut:
            warnings.warn(found.cut_sentence(self.config.max_position_embeddings), stacklevel=2)
        if found.seed is not None:
            self.last_seed = found.seed
        pad = self.config.pad_token_id if config.pad_token_id is None else config.pad_token_id
        return prompts.with_answers(found.tokens, texts, pad)

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, limits: StoppingCriteria) -> Generated:
        """Continue several prompts of any lengths; with timings."""
        return generate(self.network, prompts, sampling, limits)

    @torch.inference_mode()
    def score(self, pairs: Iterable[tuple[Any, Any]]) -> list[Score]:
        """Compute the log-probability of each continuation given its context.

        Args:
            pairs: (context, continuation), both text or both lists of token ids. Text is split into tokens as lm-eval
                does, see `Gemma2Tokenizer.split`. An empty context stands for BOS.

        Returns:
            For each pair (logprob, greedy): the natural logarithm of the probability of the whole continuation, and
            whether each of its tokens is the most probable one.

        Raises:
            ArcmergeError: if a pair has another form, or more tokens than the model's max_position_embeddings.

        Example::

            [score] = model.score([("The capital of France is", " Paris")])
            score.logprob
        """
        if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
            raise ArcmergeError(f"'pairs' must be a list of contexts with continuations, got {pairs!r:.80}.")
        sequences = [self._sequence(number, pair) for number, pair in enumerate(pairs)]
        return score(self.network, sequences) if sequences else []

    def perplexity(self, text: Any, window: int | None = None) -> float:
        """exp of the mean negative log-probability a token, BOS not counted.

        text: a str, or token ids. window: a long text is cut into pieces of window - 1 tokens, each scored after a
        BOS of its own; by default the model's max_position_embeddings.
        """
        bos, most = self.config.bos_token_id, self.config.max_position_embeddings
        tokens = self.text.encode(text) if isinstance(text, str) else read_row("text", text)
        tokens = tokens[1:] if tokens[:1] == [bos] else tokens
        if not tokens:
            raise ArcmergeError("perplexity needs at least one token beside BOS.")
        size = most if window is None else read_whole("window", window)
        if not 2 <= size <= most:
            raise ArcmergeError(
                f"'window' must be from 2 to the {most} of the model's max_position_embeddings, got {size}; leave it "
                "out for the longest."
            )
        starts = range(0, len(tokens), size - 1)
        found = self.score([([bos], tokens[start : start + size - 1]) for start in starts])
        return math.exp(-sum(one.logprob for one in found) / len(tokens))

    def _sequence(self, number: int, pair: Any) -> tuple[list[int], int]:
        """The tokens of a pair to score, and how many of them are scored."""
        pair = plain(pair)
        if isinstance(pair, str | bytes) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ArcmergeError(f"pair {number} must be a context and a continuation, got {pair!r:.80}.")
        context, continuation = pair
        if isinstance(context, str) != isinstance(continuation, str):
            kinds = " and ".join("text" if isinstance(one, str) else f"{one!r:.40}" for one in pair)
            raise ArcmergeError(f"pair {number} must be two texts or two lists of token ids, got {kinds}.")
        if isinstance(context, str) and isinstance(continuation, str):
            context, continuation = self.text.split(context, continuation)
        else:
            context = read_row(f"pair {number}", context) or [self.config.bos_token_id]
            continuation = read_row(f"pair {number}", continuation)
        if not continuation:
            raise ArcmergeError(f"pair {number} must have a continuation of one token or more.")
        tokens, most = [*context, *continuation], self.config.max_position_embeddings
        if len(tokens) - 1 > most:
            raise ArcmergeError(
                f"pair {number} has {len(tokens)} tokens, which must be at most {most + 1}: the model's "
                f"max_position_embeddings are {most}, and nothing follows the last token; shorten the context."
            )
        return tokens, len(continuation)


def _listener(stream: Callable[[Any], object] | None) -> Callable[[int, int], bool]:
    def listen(row: int, token: int) -> bool:
        if stream is not None:
            stream(token)
        return False

    return listen
