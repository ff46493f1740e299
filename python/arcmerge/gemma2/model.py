"""Gemma2: a model with the interface that users know from transformers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.checkpoint.hub import locate
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.arguments import read_device, read_dtype, read_strings, read_token_ids, read_whole
from arcmerge.gemma2.config import Gemma2Config
from arcmerge.gemma2.generation.generate import Generated, StoppingCriteria, check_token_ids, generate
from arcmerge.gemma2.generation.generation_config import GenerationConfig
from arcmerge.gemma2.generation.loglikelihood import Score, score_sequences
from arcmerge.gemma2.generation.sampler import SamplingParams
from arcmerge.gemma2.generation.text_generation import generate_answers
from arcmerge.gemma2.runtime.network import Network
from arcmerge.gemma2.runtime.runner import Runner
from arcmerge.gemma2.text.prompts import Prompts, read_pair, read_windows
from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer
from arcmerge.gemma2.weights import Weights, load, stored_dtype
from arcmerge.merging.options import Options

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from arcmerge.gemma2.generation.generation_config import GenerateArguments as Named
    from arcmerge.gemma2.merged_model import MergedGemma2
    from arcmerge.gemma2.text.conversation import Messages
    from arcmerge.merging.options import Progress

    TokenIds = TypeVar("TokenIds", list[int], list[list[int]], Tensor, NDArray[Any])

NUMERICS = ("default", "hf")


class Gemma2:
    """A Gemma-2 that generates and scores. Create one with `from_pretrained` or `from_merge`.

    Threads may share a model: calls run one after another, including their `stream` callbacks. Forked processes may use
    it too, on the CPU.

    Attributes:
        config: the settings of config.json.
        generation_config: the settings of generation_config.json.
        eos_token_ids: the token ids that end an answer: eos_token_id of generation_config.json, or else of config.json.
        network: maps tokens to hidden states.
        last_generated: tokens and timings of the last call of `generate`; None before the first.
        last_seed: the seed of the last call of `generate` that drew tokens at random; None before the first.
    """

    def __init__(self, config: Gemma2Config, weights: Weights, folder: Path, numerics: str = "default") -> None:
        if numerics not in NUMERICS:
            raise ArcmergeError(f"'numerics' must be 'default' or 'hf', got {numerics!r}")
        self.config = config
        self.network = Network(config, weights, stepwise=numerics == "hf")
        self.generation_config = GenerationConfig.read(folder)
        eos = self.generation_config.eos_token_id
        self.eos_token_ids = set(config.eos_token_id if eos is None else eos)
        self.last_generated: Generated | None = None
        self.last_seed: int | None = None
        self._folder = folder
        self._tokenizer: Gemma2Tokenizer | None = None

    def __reduce__(self) -> NoReturn:
        raise ArcmergeError(
            "'model' must not be copied or pickled, as its weights are mapped from files, got a Gemma2; open it with "
            "Gemma2.from_pretrained in every process that needs it"
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
        """Open a model.

        Args:
            path: a folder with safetensors files, or the name of a model on the hub.
            device: "auto" (the current GPU, or else the CPU), a name, a torch.device, or the index of a GPU.
            dtype: bfloat16 or float32, as a torch.dtype or a name, or "auto": the dtype in which most bytes are stored,
                float32 for float16. On the CPU, weights that are stored in it are mapped from the files; others are
                converted.
            numerics: "default" keeps softcaps, RoPE, the residual stream and logits in float32. "hf" rounds to `dtype`
                after every step, as transformers does, to reproduce its tokens.
            revision: a branch, tag or commit on the hub.

        Raises:
            ArcmergeError: naming every problem of the folder.

        Example::

            >>> model = arcmerge.Gemma2.from_pretrained("out/")
            >>> model = arcmerge.Gemma2.from_pretrained("google/gemma-2-2b-it", dtype="auto")  # doctest: +SKIP
        """
        resolved = torch.device(read_device(device))
        read_dtype(dtype, "bfloat16")
        folder = locate(str(path), revision)
        checkpoint = Checkpoint(folder)
        config = Gemma2Config.read(checkpoint.config, folder / "config.json")
        weights = load(checkpoint, config, read_dtype(dtype, stored_dtype(checkpoint)), resolved)
        return cls(config, weights, folder, numerics or "default")

    @staticmethod
    def from_merge(
        config: str | Path | Mapping[str, Any],
        device: str | torch.device | int | None = "auto",
        numerics: str | None = "default",
        *,
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
        warn: Callable[[str], None] = warnings.warn,
    ) -> MergedGemma2:
        """Merge models in memory, without writing a checkpoint. The parameters of the merge can be changed later.

        Args:
            config: a mergekit configuration: the path of a YAML file, YAML text, or a mapping.
            device, numerics: as in `from_pretrained`.
            threads: compute threads of the merge; None: `arcmerge.get_num_threads()`.
            out_shard_size, write_model_card: as in `arcmerge.merge`; nothing is written here.
            copy_tokenizer: use the tokenizer of the base model.
            allow_nonfinite: allow NaN and infinity in weights.
            allow_crimes: allow to mix architectures.
            unsafe_truncate_embeddings: truncate embeddings to the smallest vocabulary.
            transformers_cache: the folder of files from the hub.
            random_seed: as in `arcmerge.merge`.
            progress: called with the bytes merged so far and in total.
            warn: called with each warning about the configuration.

        Raises:
            ArcmergeError: naming every problem of the configuration and its models.

        Example::

            >>> model = arcmerge.Gemma2.from_merge("recipe.yml")
            >>> changed = model.set_t(0.7)
            >>> answer = model.generate("The capital of France is", max_new_tokens=8)
        """
        from arcmerge.gemma2.merged_model import MergedGemma2

        fields = {
            "device": read_device(device),
            "threads": threads,
            "out_shard_size": out_shard_size,
            "copy_tokenizer": copy_tokenizer,
            "write_model_card": write_model_card,
            "allow_nonfinite": allow_nonfinite,
            "allow_crimes": allow_crimes,
            "unsafe_truncate_embeddings": unsafe_truncate_embeddings,
            "transformers_cache": transformers_cache,
            "random_seed": random_seed,
        }
        return MergedGemma2.open(config, Options.of(fields), numerics or "default", progress, warn)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.network.weights.norm.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.network.weights.norm.dtype

    @property
    def tokenizer(self) -> Gemma2Tokenizer:
        """The tokenizer, opened on first use; raises ArcmergeError if the folder has none."""
        if self._tokenizer is None:
            self._tokenizer = Gemma2Tokenizer(self._folder, self.config.bos_token_id)
        return self._tokenizer

    @torch.inference_mode()
    def logits(self, input_ids: Any, attention_mask: Any = None) -> Tensor:
        """Compute the logits of every position.

        Args:
            input_ids: as in `generate`; lists of token ids may have different lengths, and are padded on the right.
            attention_mask: as in `generate`.

        Returns:
            [B, T, vocab_size] float32, after the softcap; 0 at padding. It takes 4 bytes per position and vocabulary
            entry, 1 MB per token.

        Raises:
            ArcmergeError: if an argument has another form, or if a prompt is empty or too long.

        Example::

            >>> model.logits([[2, 5, 6]]).shape[:2]
            torch.Size([1, 3])
        """
        prompts = Prompts.read(input_ids, attention_mask, lambda: self.tokenizer)
        rows = prompts.rows
        check_token_ids(self.network, [row for row in rows if row])
        out = torch.zeros(len(rows), prompts.width, self.config.vocab_size, device=self.device)
        runner = Runner(self.network, len(rows), max(map(len, rows)))
        lm_head = self.network.weights.lm_head
        with self.network.lock:
            for batch, hidden in runner.feed(rows):
                logits = ops.lm_head_logits(
                    hidden, lm_head, softcap=self.config.final_logit_softcapping, stepwise=self.network.stepwise
                )
                columns = torch.tensor([prompts.columns[row][position] for row, position in batch.places])
                out[batch.sequences, columns.to(self.device, non_blocking=True)] = logits
        self.network.weights.require_read()
        return out

    @overload
    def generate(self, input_ids: str | Messages, attention_mask: None = None, **named: Unpack[Named]) -> str: ...
    @overload
    def generate(
        self, input_ids: list[str] | Sequence[Messages], attention_mask: None = None, **named: Unpack[Named]
    ) -> list[str]: ...
    @overload
    def generate(self, input_ids: TokenIds, attention_mask: Any = None, **named: Unpack[Named]) -> TokenIds: ...
    @overload
    def generate(self, input_ids: Any, attention_mask: Any = None, **named: Unpack[Named]) -> Any: ...

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
                result of a tokenizer of transformers is accepted. Text is encoded with exactly one BOS.
            attention_mask: [B, T], 0 for padding, on either side. For token ids only.
            max_new_tokens: of an answer, 256 by default. An answer that reaches the model's max_position_embeddings
                ends there, with a warning.
            max_length: of prompt and answer together; applies without max_new_tokens.
            do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in `SamplingParams`.
            seed: of the random numbers. None draws a new one for every call from torch's generator; `last_seed` is it.
            eos_token_id: the token ids that end an answer, by default `eos_token_ids`; an empty list for none. By
                default the answer to a conversation also ends where the chat template ends a turn.
            pad_token_id: pads the shorter answers of a batch [B, T].
            stop: strings that end an answer and are not part of it; special tokens such as "<end_of_turn>" count.
            stream: called with each new piece of text, or with each new token id for a prompt of token ids. For one
                prompt only.

        Returns:
            The text of the answer for text and conversations. For token ids, prompt and answer together in the form of
            `input_ids`: a list, an array or a tensor. A list of these for a list of prompts.

        Raises:
            ArcmergeError: if an argument has another form or value, or if a prompt has more tokens than the model's
                max_position_embeddings.

        Example::

            >>> answer = model.generate("The capital of France is", max_new_tokens=8)
            >>> answer = model.generate([{"role": "user", "content": "Hello"}], do_sample=True, seed=1)
            >>> len(model.generate([2, 5, 6], max_new_tokens=4, eos_token_id=[]))
            7
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
        sampling_params = config.sampling_params(None if seed is None else read_whole("seed", seed))
        stop_strings = read_strings("stop", (config.stop_strings or ()) if stop is None else stop)
        prompts = Prompts.read(input_ids, attention_mask, lambda: self.tokenizer)
        if stream is not None and len(prompts.rows) > 1:
            raise ArcmergeError(f"'stream' must be None for several prompts, got one for {len(prompts.rows)} prompts")
        stop_ids = self.eos_token_ids if eos_token_id is None else set(read_token_ids("eos_token_id", eos_token_id))
        if prompts.is_chat and eos_token_id is None:
            stop_ids = stop_ids | self.tokenizer.end_of_turn_ids
        criteria = StoppingCriteria(config.max_new_tokens_for(prompts.width), stop_ids)
        generated, texts = generate_answers(
            self.network, lambda: self.tokenizer, prompts, sampling_params, criteria, stop_strings, stream
        )
        if generated.truncated:
            warnings.warn(generated.truncation_warning(self.config.max_position_embeddings), stacklevel=2)
        self.last_generated = generated
        self.last_seed = self.last_seed if generated.seed is None else generated.seed
        pad = self.config.pad_token_id if config.pad_token_id is None else config.pad_token_id
        return prompts.with_answers(generated.tokens, texts, pad)

    @torch.inference_mode()
    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling_params: SamplingParams,
        stopping_criteria: StoppingCriteria,
    ) -> Generated:
        """Generate answers to several prompts together, with their timing.

        Args:
            prompts: token ids, of any lengths.
            sampling_params, stopping_criteria: the options of sampling, and the ends of an answer.
        """
        return generate(self.network, prompts, sampling_params, stopping_criteria)

    def free_memory(self) -> int:
        """Free the memory that `generate` keeps on a GPU, at most an eighth of it: captured steps, keys and values.

        Returns:
            The number of bytes.

        Example::

            >>> freed = model.free_memory()
        """
        with self.network.lock:
            return self.network.graphs.free()

    @torch.inference_mode()
    def score(self, pairs: Iterable[tuple[Any, Any]]) -> list[Score]:
        """Compute the log-probability of each continuation given its context.

        Args:
            pairs: (context, continuation), both text or both lists of token ids. Text is split into tokens as lm-eval
                does, see `Gemma2Tokenizer.encode_pair`. An empty context stands for BOS.

        Returns:
            For each pair (logprob, is_greedy): the natural logarithm of the probability of the whole continuation, and
            whether each of its tokens is the most probable one.

        Raises:
            ArcmergeError: if a pair has another form, or more tokens than the model's max_position_embeddings.

        Example::

            >>> [score] = model.score([("The capital of France is", " Paris")])
            >>> score.logprob < 0
            True
        """
        if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
            raise ArcmergeError(f"'pairs' must be a list of contexts with continuations, got {pairs!r:.80}")
        sequences = [read_pair(index, pair, self.config, lambda: self.tokenizer) for index, pair in enumerate(pairs)]
        return score_sequences(self.network, sequences) if sequences else []

    def perplexity(self, text: Any, window: int | None = None) -> float:
        """Compute the perplexity of a text: exp of the mean negative log-probability per token, without BOS.

        Args:
            text: a str, or token ids.
            window: a longer text is split into pieces of window - 1 tokens, each scored after a BOS of its own; by
                default the model's max_position_embeddings.

        Raises:
            ArcmergeError: if an argument has another form, or if the text is empty.

        Example::

            >>> model.perplexity("The capital of France is Paris.") > 1
            True
        """
        windows = read_windows(text, window, self.config, lambda: self.tokenizer)
        scores = self.score([([self.config.bos_token_id], tokens) for tokens in windows])
        return math.exp(-sum(score.logprob for score in scores) / sum(map(len, windows)))
