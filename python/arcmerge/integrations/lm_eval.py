"""arcmerge as a model of lm-eval: the same tasks and numbers as with its own `hf`.

    python -m arcmerge.integrations.lm_eval --model arcmerge --model_args pretrained=DIR --tasks arc_easy
    python -m arcmerge.integrations.lm_eval --model arcmerge --model_args merge=recipe.yml --tasks arc_easy

The other flags are those of lm-eval. In Python: lm_eval.simple_evaluate(model=ArcmergeLM(pretrained=...), tasks=[...]).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from os import PathLike
from tempfile import TemporaryDirectory
from typing import Any

from arcmerge import interrupts

if __name__ == "__main__":  # the imports below take seconds
    interrupts.end_at_once("the evaluation is incomplete")

import torch

from arcmerge.errors import ArcmergeError, needed
from arcmerge.gemma2.generation.generate import StoppingCriteria
from arcmerge.gemma2.generation.text_generation import generate_text
from arcmerge.gemma2.model import Gemma2
from arcmerge.gemma2.text.tokenizer import Gemma2Tokenizer
from arcmerge.integrations.lm_eval_arguments import check_others
from arcmerge.threads import use_threads

with needed("lm_eval", by="arcmerge.integrations.lm_eval", extra="lm-eval", module=__name__):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm

    from arcmerge.integrations.lm_eval_generation import GenerationArguments

# Requests that are scored together: a shared context goes through the network once.
SCORE_BATCH = 64
# Answers that are generated together: one pass over the weights serves all of them.
GENERATE_BATCH = 8

Tokens = list[int]
_log = logging.getLogger(__name__)


@register_model("arcmerge")
class ArcmergeLM(TemplateLM):
    """A Gemma-2, or a merge of several, as a model of lm-eval.

    Args:
        pretrained: folder or hub name of a model, or a Gemma2.
        merge: a merge configuration, merged in memory.
        model: a Gemma2. Exactly one of these three must be given.
        revision: a branch, tag or commit of `pretrained` on the hub.
        dtype: "auto" (as stored), "bfloat16" or "float32"; a merge has the dtype of its configuration.
        device, numerics: as in Gemma2.from_pretrained.
        threads: compute threads.
        tokenizer: folder or hub name of another tokenizer, or a tokenizer of transformers.
        max_length: tokens of a window, by default the model's max_position_embeddings.
        max_gen_toks: maximum tokens of an answer for tasks that do not set it.
        add_bos_token: True adds BOS to every text, False never, None as the tokenizer does.
        prefix_token_id: the token before a text without context, by default BOS.
        think_end_token: the answer begins after the last occurrence of this string or token id.
        enable_thinking, chat_template_args: variables of the chat template.
        batch_size, max_batch_size: accepted and ignored; memory is bounded in any case.
        others: further arguments of `hf`, which must not change results.

    Raises:
        ArcmergeError: naming every problem of the model or the arguments.

    Example::

        >>> import lm_eval
        >>> from arcmerge.integrations.lm_eval import ArcmergeLM
        >>> model = ArcmergeLM(pretrained="out/")
        >>> results = lm_eval.simple_evaluate(model=model, tasks=["arc_easy"])  # doctest: +SKIP
    """

    def __init__(
        self,
        pretrained: str | None = None,
        merge: str | None = None,
        model: Gemma2 | None = None,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        numerics: str = "default",
        threads: int | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if threads is not None:
            use_threads(int(threads))
        own = {"pretrained", "merge", "model", *(ArcmergeLM.__init__.__kwdefaults__ or {})}
        for warning in check_others(others, own):
            _log.warning(warning)
        if isinstance(pretrained, Gemma2):  # `hf` takes a loaded model here too
            pretrained, model = None, pretrained
        if not isinstance(pretrained, str | PathLike | None):
            raise ArcmergeError(
                f"'pretrained' must be a folder, a hub name or a Gemma2, got a {type(pretrained).__name__}; save the "
                "model with save_pretrained, and give its folder"
            )
        if sum(given is not None for given in (pretrained, merge, model)) != 1:
            raise ArcmergeError(
                "'model_args' must have exactly one of pretrained=DIR and merge=CONFIG, got none or several of them"
            )
        if enable_thinking and think_end_token is None:
            raise ArcmergeError("'think_end_token' must be a string or a token id if enable_thinking is true, got None")
        device = str(device or "auto")
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "auto"  # lm-eval passes cuda:0 by default
        if pretrained is not None:
            model = Gemma2.from_pretrained(pretrained, device, dtype, numerics, revision)
        elif merge is not None:
            model = Gemma2.from_merge(merge, device, numerics)
        assert model is not None
        self.model = model
        self._revision = revision or "main"
        self._tokenizer = self._open_tokenizer(tokenizer)
        self.max_length = int(max_length or model.config.max_position_embeddings)
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        digits = isinstance(think_end_token, str) and think_end_token.isdigit()
        self.think_end_token = int(str(think_end_token)) if digits else think_end_token
        self.enable_thinking = enable_thinking
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.chat_template_args = {**(chat_template_args or {}), **thinking}

    def _open_tokenizer(self, given: Any) -> Gemma2Tokenizer:
        if given is None:
            return self.model.tokenizer
        if not isinstance(given, str | PathLike):
            self._saved = TemporaryDirectory(prefix="arcmerge-")  # removed with this object
            given.save_pretrained(self._saved.name)
            given = self._saved.name
        return Gemma2Tokenizer.from_pretrained(str(given), self.model.config.bos_token_id)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.model.config.eos_token_id[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.model.config.bos_token_id if self._prefix_token_id is None else int(self._prefix_token_id)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in lm-eval's caches of requests."""
        return self._tokenizer.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """The description of the model in lm-eval's results."""
        count = sum(tensor.numel() for tensor in self.model.network.weights.tensors)
        return {
            "model_num_parameters": count,
            "model_dtype": self.model.dtype,
            "model_revision": self._revision,
            "model_sha": "",
        }

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template, or None for False; a name selects one of several templates."""
        if not chat_template:
            return None
        named = isinstance(chat_template, str) and self._tokenizer.has_named_templates
        return self._tokenizer.chat_template_named(str(chat_template) if named else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without a generation prompt the model continues the last message.

        A system message that the template refuses is dropped with a warning, as `hf` does.
        """

        def render(messages: list[dict[str, str]]) -> str:
            return self._tokenizer.render_chat(
                messages,
                add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_args,
            )

        try:
            return render(chat_history)
        except ArcmergeError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            rendered = render(others)
            _log.warning(f"dropped the system message: {error}")
            return rendered

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> Tokens:
        """Token ids of a text, with the special tokens that the tokenizer adds, as in `hf`, unless it begins with BOS.

        add_special_tokens: with or without them, whatever the text begins with. left_truncate_len: how many of the last
        tokens are kept.
        """
        if add_special_tokens is None:
            begins = string.startswith(self.tok_decode(self.prefix_token_id, skip_special_tokens=False))
            add_special_tokens = not begins
        if not add_special_tokens or self.add_bos_token is False:
            tokens = self._tokenizer.encode_plain(string)
        elif self.add_bos_token:
            tokens = [self.model.config.bos_token_id, *self._tokenizer.encode_plain(string)]
        else:
            tokens = self._tokenizer.encode_with_special(string)
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer.decode([tokens] if isinstance(tokens, int) else tokens, skip_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        return self._tokenizer.encode_pair(context, continuation, self.tok_encode)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(logprob, is_greedy) of the continuation of each request (context, continuation)."""
        if self.enable_thinking:
            raise ArcmergeError("'enable_thinking' must be False for tasks that score given answers, got True")
        empty = next((request.args for request in requests if not request.args[1]), None)
        if empty is not None:
            raise ArcmergeError(f"'continuation' must have one character or more, got '' after {empty[0]!r:.80}")
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._truncated(context, rest) for _, context, rest in requests]
        cut = sum(len(pair[0]) < len(context) for pair, (_, context, _) in zip(pairs, requests, strict=True))
        if cut:
            _log.warning(
                f"{cut} of {len(requests)} contexts are truncated on the left: with their answers they exceed the "
                f"{self.max_length} tokens of a window"
            )
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for start in range(0, len(requests), SCORE_BATCH):
                some = slice(start, start + SCORE_BATCH)
                scores = self.model.score(pairs[some])
                for (request, *_unused), score in zip(requests[some], scores, strict=True):
                    found.append((score.logprob, score.is_greedy))
                    if request is not None:
                        self.cache_hook.add_partial("loglikelihood", request, found[-1])
                bar.update(len(scores))
        return found

    def _truncated(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, Tokens]:
        """The pair with its context truncated on the left; the last token is scored and needs no slot.

        Raises ArcmergeError for an answer that does not fit, as `hf` does.
        """
        if not continuation:
            raise ArcmergeError("'continuation' must have one token or more besides its context, got none")
        if len(continuation) > self.max_length:
            raise ArcmergeError(
                f"'continuation' must have at most {self.max_length} tokens, the length of a window, got "
                f"{len(continuation)}; increase max_length if the model supports more"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in lm-eval's windows: BOS, then the tokens of the text with its own BOS."""
        windows, counts = [], []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        found = []
        for request, count in zip(requests, counts, strict=True):
            found.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers; each draws from its own stream of random numbers, by its index in `requests`."""
        found = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for indices in by_options.values():
                options = requests[indices[0]].args[1]
                arguments = GenerationArguments.read(options, self.model.generation_config, self.max_gen_toks, eos)
                for warning in arguments.warnings:
                    _log.warning(warning)
                contexts = {index: requests[index].args[0] for index in indices}
                prompts = self._prompts(contexts, arguments.max_new_tokens)
                ordered = sorted(indices, key=lambda index: len(prompts[index]))
                for start in range(0, len(ordered), GENERATE_BATCH):
                    batch = ordered[start : start + GENERATE_BATCH]
                    texts = self._generate([prompts[index] for index in batch], arguments, batch)
                    for index, text in zip(batch, texts, strict=True):
                        found[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return found

    def _prompts(self, contexts: dict[int, str], max_new_tokens: int) -> dict[int, Tokens]:
        """The last tokens of each context, by its index, that leave room for an answer."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ArcmergeError(
                f"'max_gen_toks' must be below {self.max_length}, the tokens of a window, got {max_new_tokens}"
            )
        tokens = {index: self.tok_encode(text) or [self.prefix_token_id] for index, text in contexts.items()}
        if cut := sum(len(prompt) > room for prompt in tokens.values()):
            _log.warning(
                f"{cut} of {len(tokens)} contexts are truncated on the left to {room} tokens, to leave room for "
                f"{max_new_tokens} new ones"
            )
        return {index: prompt[-room:] for index, prompt in tokens.items()}

    def _generate(self, prompts: list[Tokens], arguments: GenerationArguments, random_streams: list[int]) -> list[str]:
        longest = max(len(prompt) for prompt in prompts)
        if arguments.max_length is not None and longest >= arguments.max_length:
            raise ArcmergeError(
                f"'max_length' must be above the {longest} tokens of the context, which it includes, got "
                f"{arguments.max_length}; give max_gen_toks instead"
            )
        stop_ids = self.model.eos_token_ids if arguments.stop_token_ids is None else arguments.stop_token_ids
        result = generate_text(
            self.model.network,
            self._tokenizer,
            prompts,
            arguments.sampling_params,
            StoppingCriteria(arguments.max_new_tokens, stop_ids, arguments.max_length),
            arguments.stop_strings,
            random_streams=random_streams,
        )
        return [self._answer(tokens, arguments.stop_strings) for tokens in result.generated.tokens]

    def _answer(self, tokens: Tokens, stop_strings: list[str]) -> str:
        """The text of an answer after its thinking, up to the first stop string."""
        end = self.think_end_token
        if isinstance(end, int) and end in tokens:
            text = self.tok_decode(tokens[len(tokens) - tokens[::-1].index(end) :]).lstrip()
        else:
            text = self.tok_decode(tokens)
        return postprocess_generated_text(text, stop_strings, end if isinstance(end, str) else None)


def main() -> None:
    """The command of lm-eval with this model; a problem of the model is one line, and the exit code is 1."""
    from lm_eval.__main__ import cli_evaluate

    use_threads(None)
    try:
        cli_evaluate()
    except ArcmergeError as error:
        sys.exit(f"arcmerge: {error}")


if __name__ == "__main__":
    main()
