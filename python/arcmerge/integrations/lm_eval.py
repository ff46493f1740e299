"""lm-eval with arcmerge as its model: the same tasks and numbers as with its own `hf`.

    python -m arcmerge.integrations.lm_eval --model arcmerge --model_args pretrained=DIR --tasks arc_easy
    python -m arcmerge.integrations.lm_eval --model arcmerge --model_args merge=recipe.yml --tasks arc_easy

Its other flags are those of lm-eval. In Python: lm_eval.simple_evaluate(model=ArcmergeLM(pretrained=...), tasks=[...]).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.generation import Limits
from arcmerge.gemma2.model import Gemma2
from arcmerge.gemma2.sampling import Sampling
from arcmerge.gemma2.text import Stream

# Requests that are scored together: what they share goes through the network once.
SCORED_TOGETHER = 64
# Answers that are generated together: weights are read once for all of them.
GENERATED_TOGETHER = 8
_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Tokens = list[int]


@register_model("arcmerge")
class ArcmergeLM(TemplateLM):
    """A Gemma-2, or a merge of some, for lm-eval.

    pretrained: folder or hub name; or merge: a merge configuration, merged in memory; or model: a Gemma2 that there is.
    dtype: "bfloat16" or "float32"; of a merge, what the configuration says. device, numerics: as Gemma2.from_pretrained
    has them. max_length: tokens of a window, by default the model's max_position_embeddings. batch_size and
    max_batch_size are accepted: memory is bounded whatever they are.
    Raises ArcmergeError for what is wrong with the model.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        merge: str | None = None,
        model: Gemma2 | None = None,
        dtype: str = "auto",
        device: str | None = None,
        numerics: str = "default",
        max_length: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if sum(given is not None for given in (pretrained, merge, model)) != 1:
            raise ArcmergeError("model_args must give one of pretrained=DIR and merge=CONFIG")
        if dtype not in _DTYPES:
            raise ArcmergeError(f"dtype must be auto, bfloat16 or float32, got '{dtype}'")
        device = device or "auto"
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "auto"  # lm-eval asks for cuda:0 where its user asks for nothing
        if pretrained is not None:
            model = Gemma2.from_pretrained(pretrained, device, _DTYPES[dtype], numerics)
        elif merge is not None:
            model = Gemma2.from_merge(merge, device, numerics)
        assert model is not None
        self.model = model
        self.max_length = int(max_length or model.config.max_position_embeddings)
        self.max_gen_toks = 256

    @property
    def eot_token_id(self) -> int:
        return self.model.config.eos_token_id[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.model.config.bos_token_id

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval tells its caches of requests apart."""
        return self.model.text.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.model.text.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.model.text.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Tokens:
        """Tokens with the special ones that the tokenizer adds, as `hf` has them, or with none where that is False."""
        text = self.model.text
        return text.encode_plain(string) if add_special_tokens is False else text.encode_with_special(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for start in range(0, len(requests), SCORED_TOGETHER):
                some = requests[start : start + SCORED_TOGETHER]
                scores = self.model.score([self._window(context, rest) for _, context, rest in some])
                for (request, *_unused), score in zip(some, scores, strict=True):
                    found.append((score.logprob, score.greedy))
                    if request is not None:
                        self.cache_hook.add_partial("loglikelihood", request, found[-1])
                bar.update(len(some))
        return found

    def _window(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, Tokens]:
        """The last tokens that the model can take; the last of all goes in no more, as nothing follows it."""
        whole = [*context, *continuation][-(self.max_length + 1) :]
        scored = min(len(continuation), len(whole) - 1)
        return whole[: len(whole) - scored], whole[len(whole) - scored :]

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
        found = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for numbers in alike.values():
                ordered = sorted(numbers, key=lambda number: len(requests[number].args[0]))
                for start in range(0, len(ordered), GENERATED_TOGETHER):
                    some = ordered[start : start + GENERATED_TOGETHER]
                    contexts = [requests[number].args[0] for number in some]
                    for number, answer in zip(some, self._generate(contexts, requests[some[0]].args[1]), strict=True):
                        found[number] = answer
                        self.cache_hook.add_partial("generate_until", requests[number].args, answer)
                    bar.update(len(some))
        return found

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        until = handle_stop_sequences(options.pop("until", None), eos=None)
        most = int(options["max_gen_toks"])
        if most >= self.max_length:
            raise ArcmergeError(f"max_gen_toks must be below the {self.max_length} tokens of the model, got {most}")
        drawn = {key: options[key] for key in ("temperature", "top_k", "top_p", "min_p") if key in options}
        sampling = Sampling(do_sample=True, **drawn) if options.get("do_sample") else Sampling()
        tokens = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        prompts = [some[most - self.max_length :] for some in tokens]
        streams = [Stream(self.model.text, [stop for stop in until if stop]) for _ in contexts]

        def on_token(row: int, token: int) -> bool:
            if token not in self.model.ends:
                streams[row].push(token)
            return streams[row].stopped

        answers = self.model.run(prompts, sampling, Limits(most, self.model.ends, on_token)).tokens
        return [postprocess_generated_text(self.model.text.decode(tokens), until, None) for tokens in answers]


def main() -> None:
    """lm-eval's command, with this model; ends the process with 1 and a sentence for what is wrong with the model."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ArcmergeError as error:
        sys.exit(f"arcmerge: {error}")


if __name__ == "__main__":
    main()
