"""lm-eval with arcmerge as its model: the same tasks and numbers as with its own `hf`.

    python -m arcmerge.integrations.lm_eval --model arcmerge --model_args pretrained=DIR --tasks arc_easy
    python -m arcmerge.integrations.lm_eval --model arcmerge --model_args merge=recipe.yml --tasks arc_easy

Its other flags are those of lm-eval. In Python: lm_eval.simple_evaluate(model=ArcmergeLM(pretrained=...), tasks=[...]).
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

if __name__ == "__main__":  # what follows takes seconds
    interrupts.end_at_once("the evaluation is incomplete")

import torch

from arcmerge.errors import ArcmergeError, needed
from arcmerge.gemma2.generation.generate import StoppingCriteria
from arcmerge.gemma2.generation.text_generation import answer
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

# Requests that are scored together: what they share goes through the network once.
SCORED_TOGETHER = 64
# Answers that are generated together: weights are read once for all of them.
GENERATED_TOGETHER = 8

Tokens = list[int]
_log = logging.getLogger(__name__)


@register_model("arcmerge")
class ArcmergeLM(TemplateLM):
    """A Gemma-2, or a merge of some, for lm-eval.

    Args:
        pretrained: folder or hub name of a model; `revision` of the latter.
        merge: a merge configuration, merged in memory.
        model: a Gemma2 that is loaded already. One of these three must be given.
        dtype: "auto" (as stored), "bfloat16" or "float32"; of a merge, what the configuration says.
        device, numerics, threads: as in Gemma2.from_pretrained.
        tokenizer: folder or hub name of another tokenizer, or a tokenizer of transformers.
        max_length: tokens of a window, by default the model's max_position_embeddings.
        max_gen_toks: tokens of an answer where a task does not say.
        add_bos_token: True puts BOS before every text, False before none, None does as the tokenizer.
        prefix_token_id: the token before a text without context, by default BOS.
        think_end_token: an answer begins after the last of these, a string or a token id.
        enable_thinking, chat_template_args: variables of the chat template.
        batch_size, max_batch_size: accepted; memory is bounded whatever they are.

    Other arguments of `hf` are accepted if they change no number.
    Raises ArcmergeError for what is wrong with the model or the arguments.
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
        for sentence in check_others(others, own):
            _log.warning(sentence)
        if isinstance(pretrained, Gemma2):  # as `hf` takes a loaded model
            pretrained, model = None, pretrained
        if not isinstance(pretrained, str | PathLike | None):
            raise ArcmergeError(
                f"'pretrained' must be a folder, a hub name or a Gemma2, got a {type(pretrained).__name__}; save the "
                "model with save_pretrained, and give its folder"
            )
        if sum(given is not None for given in (pretrained, merge, model)) != 1:
            raise ArcmergeError("model_args must give one of pretrained=DIR and merge=CONFIG")
        if enable_thinking and think_end_token is None:
            raise ArcmergeError("'think_end_token' must be given where 'enable_thinking' is true")
        device = str(device or "auto")
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "auto"  # lm-eval asks for cuda:0 where its user asks for nothing
        if pretrained is not None:
            model = Gemma2.from_pretrained(pretrained, device, dtype, numerics, revision)
        elif merge is not None:
            model = Gemma2.from_merge(merge, device, numerics)
        assert model is not None
        self.model = model
        self._revision = revision or "main"
        self.text = self._tokenizer(tokenizer)
        self.max_length = int(max_length or model.config.max_position_embeddings)
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        digits = isinstance(think_end_token, str) and think_end_token.isdigit()
        self.think_end_token = int(str(think_end_token)) if digits else think_end_token
        self.enable_thinking = enable_thinking
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.chat_template_args = {**(chat_template_args or {}), **thinking}

    def _tokenizer(self, given: Any) -> Gemma2Tokenizer:
        if given is None:
            return self.model.text
        if not isinstance(given, str | PathLike):
            self._saved = TemporaryDirectory(prefix="arcmerge-")  # until this object goes
            given.save_pretrained(self._saved.name)
            given = self._saved.name
        return Gemma2Tokenizer.from_pretrained(str(given), self.model.config.bos_token_id)

    @property
    def eot_token_id(self) -> int:
        return self.model.config.eos_token_id[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self.model.config.bos_token_id if self._prefix_token_id is None else int(self._prefix_token_id)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval tells its caches of requests apart."""
        return self.text.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results say of the model."""
        count = sum(tensor.numel() for tensor in self.model.network.weights.tensors)
        return {
            "model_num_parameters": count,
            "model_dtype": self.model.dtype,
            "model_revision": self._revision,
            "model_sha": "",
        }

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template, of several the one of that name where a name is given; None for none."""
        if not chat_template:
            return None
        named = isinstance(chat_template, str) and self.text.has_named_templates
        return self.text.template_named(str(chat_template) if named else None)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, whose last turn stays open where no generation prompt is added.

        A system message that the template refuses is left out with a warning, as `hf` does.
        """

        def render(messages: list[dict[str, str]]) -> str:
            return self.text.render(
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
            _log.warning(f"the system message is left out: {error}")
            return rendered

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> Tokens:
        """Tokens of a text, with the special ones that the tokenizer adds, as `hf` has them, unless it begins with BOS.

        add_special_tokens: with them or without, whatever the text begins with. left_truncate_len: how many tokens are
        kept, the last ones.
        """
        if add_special_tokens is None:
            begins = string.startswith(self.tok_decode(self.prefix_token_id, skip_special_tokens=False))
            add_special_tokens = not begins
        if not add_special_tokens or self.add_bos_token is False:
            tokens = self.text.encode_plain(string)
        elif self.add_bos_token:
            tokens = [self.model.config.bos_token_id, *self.text.encode_plain(string)]
        else:
            tokens = self.text.encode_with_special(string)
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.text.decode([tokens] if isinstance(tokens, int) else tokens, skip_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        return self.text.split(context, continuation, self.tok_encode)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise ArcmergeError("'enable_thinking' must be false for tasks that score given answers, as it is for `hf`")
        empty = next((request.args for request in requests if not request.args[1]), None)
        if empty is not None:
            raise ArcmergeError(f"an answer to score must have at least one character, got '' after {empty[0]!r:.80}")
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._window(context, rest) for _, context, rest in requests]
        cut = sum(len(pair[0]) < len(context) for pair, (_, context, _) in zip(pairs, requests, strict=True))
        if cut:
            _log.warning(
                f"{cut} of {len(requests)} contexts are cut on the left: with their answers they are longer than the "
                f"{self.max_length} tokens of a window"
            )
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for start in range(0, len(requests), SCORED_TOGETHER):
                some = slice(start, start + SCORED_TOGETHER)
                scores = self.model.score(pairs[some])
                for (request, *_unused), score in zip(requests[some], scores, strict=True):
                    found.append((score.logprob, score.greedy))
                    if request is not None:
                        self.cache_hook.add_partial("loglikelihood", request, found[-1])
                bar.update(len(scores))
        return found

    def _window(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, Tokens]:
        """The last tokens that the model can take; the last of all goes in no more, as nothing follows it.

        Raises ArcmergeError for an answer that is longer than that, as `hf` does.
        """
        if not continuation:
            raise ArcmergeError("an answer to score must have at least one token beside the one before it, got none")
        if len(continuation) > self.max_length:
            raise ArcmergeError(
                f"an answer to score must fit into the {self.max_length} tokens of a window, got one of "
                f"{len(continuation)}; raise max_length if the model can take more"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that lm-eval cuts: BOS, then the tokens of the text, its own BOS among them."""
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
        """Answers, each drawn from a stream of its own: that of its place in `requests`."""
        found = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for numbers in alike.values():
                end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
                options = requests[numbers[0]].args[1]
                asked = GenerationArguments.read(options, self.model.generation_config, self.max_gen_toks, end)
                for sentence in asked.ignored:
                    _log.warning(sentence)
                prompts = self._prompts({number: requests[number].args[0] for number in numbers}, asked.max_new_tokens)
                ordered = sorted(numbers, key=lambda number: len(prompts[number]))
                for start in range(0, len(ordered), GENERATED_TOGETHER):
                    some = ordered[start : start + GENERATED_TOGETHER]
                    texts = self._generate([prompts[number] for number in some], asked, some)
                    for number, text in zip(some, texts, strict=True):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(some))
        return found

    def _prompts(self, contexts: dict[int, str], max_new_tokens: int) -> dict[int, Tokens]:
        """The last tokens of each context that leave room for an answer."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ArcmergeError(
                f"max_gen_toks must be below the {self.max_length} tokens of the model, got {max_new_tokens}"
            )
        tokens = {number: self.tok_encode(text) or [self.prefix_token_id] for number, text in contexts.items()}
        if cut := sum(len(prompt) > room for prompt in tokens.values()):
            _log.warning(
                f"{cut} of {len(tokens)} contexts are cut on the left to {room} tokens, to leave room for "
                f"{max_new_tokens} new ones"
            )
        return {number: prompt[-room:] for number, prompt in tokens.items()}

    def _generate(self, prompts: list[Tokens], asked: GenerationArguments, draws: list[int]) -> list[str]:
        ends = self.model.ends if asked.ends is None else asked.ends
        lengths = [len(prompt) for prompt in prompts]
        if asked.max_length is not None and (longest := max(lengths)) >= asked.max_length:
            raise ArcmergeError(
                f"'max_length' must be above the {longest} tokens of a context, which it counts too, got "
                f"{asked.max_length}; give max_gen_toks instead"
            )

        def on_token(row: int, token: int) -> bool:
            lengths[row] += 1
            return lengths[row] == asked.max_length

        limits = StoppingCriteria(asked.max_new_tokens, ends, on_token)
        found = answer(self.model.network, self.text, prompts, asked.sampling, limits, asked.stops, draws=draws)
        return [self._answer(tokens, asked.stops) for tokens in found.generated.tokens]

    def _answer(self, tokens: Tokens, stops: list[str]) -> str:
        """The text of an answer without what was thought before it and without what stops it."""
        thought = self.think_end_token
        if isinstance(thought, int) and thought in tokens:
            text = self.tok_decode(tokens[len(tokens) - tokens[::-1].index(thought) :]).lstrip()
        else:
            text = self.tok_decode(tokens)
        return postprocess_generated_text(text, stops, thought if isinstance(thought, str) else None)


def main() -> None:
    """lm-eval's command, with this model; ends the process with 1 and a sentence for what is wrong with the model."""
    from lm_eval.__main__ import cli_evaluate

    use_threads(None)
    try:
        cli_evaluate()
    except ArcmergeError as error:
        sys.exit(f"arcmerge: {error}")


if __name__ == "__main__":
    main()
