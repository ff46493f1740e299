"""The scores of a sweep: each gives a model one number."""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any, Protocol

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError

if TYPE_CHECKING:
    from arcmerge.gemma2.model import Gemma2


class Score(Protocol):
    """Scores a model.

    Attributes:
        title: the name in tables and plots.
        minimize: whether a lower score is better.
        identity: a text that differs between scores that are not the same; it is kept in the journal.
    """

    title: str
    minimize: bool
    identity: str

    def __call__(self, model: Gemma2) -> float: ...


@dataclass(frozen=True)
class Item:
    """A part of a text or of a task that has a loss of its own.

    Args:
        size: the weight of the item in the mean: the tokens of a window, 1 for a question.
        pairs: token ids of contexts and continuations.
        answer: the index of the right continuation of a question.
    """

    size: int
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    answer: int = 0


class MeanScore:
    """A score that follows from the mean loss of items, so that a race can compare candidates item by item.

    Attributes:
        unit: what the sizes of the items count, in tables: "tokens" or "questions".
        block: a race compares candidates whenever items of this size are scored.
    """

    title: str
    minimize: bool
    identity: str
    unit: str
    block: int

    def items(self, model: Gemma2) -> list[Item]:
        """The items; ArcmergeError for one that the model cannot score."""
        raise NotImplementedError

    def losses(self, model: Gemma2, items: Sequence[Item]) -> list[float]:
        """The loss of each item. It grows with its size, and lower is better."""
        raise NotImplementedError

    def of_mean(self, loss: float) -> float:
        """The score whose items have this mean loss."""
        raise NotImplementedError

    def of_losses(self, losses: Sequence[float], items: Sequence[Item]) -> float:
        return self.of_mean(sum(losses) / sum(item.size for item in items))

    def __call__(self, model: Gemma2) -> float:
        items = self.items(model)
        return self.of_losses(self.losses(model, items), items)


@dataclass(frozen=True)
class Scoring:
    """How the candidates of a sweep are scored.

    Args:
        scores: the scores. The first one decides which candidate is best.
        seeds: the seeds that each candidate of a random method is scored for; empty for the seed of the recipe alone.
        race: the seed of the order of the items in a race; None for no race.
    """

    scores: Sequence[Score]
    seeds: Sequence[int] = ()
    race: int | None = None

    @property
    def unit(self) -> str | None:
        """What a race counts: "tokens" or "questions"."""
        return self.items_score.unit if self.race is not None else None

    @property
    def items_score(self) -> MeanScore:
        """The score of a race."""
        (score,) = self.scores
        assert isinstance(score, MeanScore)
        return score

    def identity(self) -> dict[str, Any]:
        first, *others = self.scores
        also = [other.identity for other in others]
        return {"score": first.identity, "also": also, "seeds": list(self.seeds), "race": self.race}


class Perplexity(MeanScore):
    """The perplexity of texts: exp of the mean negative log-probability of all their tokens, whichever text has them.

    Args:
        texts: the texts. Each is cut into windows.
        window: the number of tokens in a window, the BOS token in front included; None for the model's maximum.

    Raises:
        ArcmergeError: for a text without words.
    """

    minimize = True
    unit = "tokens"
    # Reading the weights of a 2.6B model takes 0.3 s, and scoring so many tokens 2 s on two cores.
    block = 64

    def __init__(self, texts: Sequence[str], window: int | None = None) -> None:
        if not all(text.strip() for text in texts):
            raise ArcmergeError("'text' must not be empty, got a text without words")
        self.texts = texts
        self.window = window
        self.title = "perplexity" + (f", windows of {window} tokens" if window else "")
        self.identity = _digest("perplexity", str(window), *texts)

    def items(self, model: Gemma2) -> list[Item]:
        from arcmerge.gemma2.text.prompts import read_windows

        bos = [model.config.bos_token_id]
        windows = [
            tokens
            for text in self.texts
            for tokens in read_windows(text, self.window, model.config, lambda: model.tokenizer)
        ]
        return [Item(len(tokens), [(bos, tokens)]) for tokens in windows]

    def losses(self, model: Gemma2, items: Sequence[Item]) -> list[float]:
        return [-one.logprob for one in model.score([pair for item in items for pair in item.pairs])]

    def of_mean(self, loss: float) -> float:
        return math.exp(loss)


@dataclass(frozen=True)
class Question:
    """A context, the texts that may follow it, and the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


class MultipleChoice(MeanScore):
    """The accuracy on questions: how often the right choice is the most probable one, as `acc` of lm-eval."""

    title = "accuracy"
    minimize = False
    unit = "questions"
    block = 16  # the mean of so many zeros and ones is nearly normal

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self.identity = _digest("choices", *map(repr, questions))

    def items(self, model: Gemma2) -> list[Item]:
        limit = model.config.max_position_embeddings + 1  # no token follows the last one
        found = []
        for question in self.questions:
            pairs = [model.tokenizer.encode_pair(question.context, choice) for choice in question.choices]
            if (longest := max(len(context) + len(answer) for context, answer in pairs)) > limit:
                raise ArcmergeError(
                    f"'context' and a choice must have at most {limit} tokens, the model's maximum, got {longest} in "
                    f"{question.context!r:.80}"
                )
            found.append(Item(1, pairs, question.answer))
        return found

    def losses(self, model: Gemma2, items: Sequence[Item]) -> list[float]:
        """-1 for a right answer, 0 for a wrong one."""
        scores = iter([one.logprob for one in model.score([pair for item in items for pair in item.pairs])])
        losses = []
        for item in items:
            found = [next(scores) for _ in item.pairs]
            losses.append(-float(found.index(max(found)) == item.answer))
        return losses

    def of_mean(self, loss: float) -> float:
        return -loss


class Function:
    """A function of the user that takes a Gemma2 and returns a number.

    Args:
        function: the function, or its name as "module:function". Modules in the working directory are found too. A
            sweep is resumed for a function of the same name and, if the function itself is given, the same code.
        minimize: whether a lower score is better.

    Raises:
        ArcmergeError: if the name is wrong, or the module cannot be imported.
    """

    def __init__(self, function: str | Callable[[Any], float], minimize: bool) -> None:
        self._given = function
        self._function = _function_of(function) if isinstance(function, str) else function
        if not callable(self._function):
            raise ArcmergeError(f"'function' must be a function of a model, got {self._function!r:.80}")
        if isinstance(function, str):
            self._name, code = function, ""
        else:
            self._name = (
                f"{getattr(function, '__module__', '')}:{getattr(function, '__name__', type(function).__name__)}"
            )
            code = _code_of(getattr(function, "__code__", None))
        self.title = self._name.rpartition(":")[2]
        # Two lambdas have one name, so the code of a function that is no name tells it from another.
        self.minimize, self.identity = minimize, _digest("function", self._name, *([code] if code else []))

    def __call__(self, model: Gemma2) -> float:
        """Raises ArcmergeError, with the line in the user's file, if the function raises or returns no number."""
        try:
            value = self._function(model)
        except ArcmergeError:
            raise
        except (Exception, SystemExit) as error:
            raise ArcmergeError(f"'{self._name}' must return a number, got {_raised(error)}") from error
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ArcmergeError(f"'{self._name}' must return a number, got {value!r:.80}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """A function that was given by name is imported again in another process."""
        return Function, (self._given, self.minimize)


def _function_of(name: str) -> Callable[[Any], float]:
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ArcmergeError(f"'function' must be named module:function, got '{name}'")
    if "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ArcmergeError(f"'function' must name a module that can be imported, got '{name}': {error}") from error
    except (Exception, SystemExit) as error:
        raise ArcmergeError(f"'{name}' must be in a module that can be imported, got {_raised(error)}") from error
    if not hasattr(found, function):
        raise ArcmergeError(f"'function' must be in its module, got '{name}' and no '{function}' in {module}")
    chosen: Callable[[Any], float] = getattr(found, function)
    return chosen


def _code_of(code: Any) -> str:
    """The instructions and constants of a function, which are the same in every process."""
    if isinstance(code, frozenset):
        return " ".join(sorted(map(repr, code)))
    if not isinstance(code, CodeType):
        return "" if code is None else repr(code)
    return " ".join([code.co_code.hex(), *code.co_names, *map(_code_of, code.co_consts)])


def _raised(error: BaseException) -> str:
    """The type of an exception of a user's code, the line that raised it, and its message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}:{frame.lineno}"
    if isinstance(error, SyntaxError):  # the import raises it, and no line of the file
        where = f"{error.filename}:{error.lineno}"
    reason = f": {error}" if str(error) else ""
    return f"{type(error).__name__} at {where}{reason}"


def read_texts(files: Sequence[Path]) -> list[str]:
    """The contents of text files in UTF-8. Raises ArcmergeError for a file that cannot be read."""
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise ArcmergeError(f"'text' must be files in UTF-8 that can be read, got an error: {error}") from error


def read_questions(file: Path) -> list[Question]:
    """Questions from a file with one JSON object per line.

    Each line is `{"context": text, "choices": [texts], "answer": index of the right choice}`.
    Raises ArcmergeError for a file that cannot be read, another line, or a file without questions.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArcmergeError(f"'tasks' must be a file in UTF-8 that can be read, got an error: {error}") from error
    found = [_question(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ArcmergeError(f"'{file}' must contain questions, got none")
    return found


def _question(line: str, location: str) -> Question:
    try:
        entry = parse_object(line.encode(), Path(location))
        context, choices, answer = (entry[key] for key in ("context", "choices", "answer"))
        texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(one, str) and one for one in choices)
        if not (isinstance(context, str) and texts and type(answer) is int and 0 <= answer < len(choices)):
            raise KeyError
    except (ArcmergeError, KeyError) as error:
        raise ArcmergeError(
            f"{location}: 'question' must be "
            '{"context": text, "choices": [two texts or more, none empty], "answer": the index of the right one}'
            f", got {line:.80}"
        ) from error
    return Question(context, tuple(choices), answer)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
