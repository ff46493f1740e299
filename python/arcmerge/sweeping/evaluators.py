"""Evaluators merge and score candidates: in this process, or in the actors of a Ray cluster."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np

from arcmerge.errors import ArcmergeError, needed
from arcmerge.sweeping.candidates import Candidate
from arcmerge.sweeping.journal import Scored
from arcmerge.sweeping.race import Task, order_of
from arcmerge.sweeping.rival import Rival, first_look
from arcmerge.sweeping.scores import Scoring

# A candidate whose actor dies this often is taken for the cause.
MAX_DEATHS = 3


# Gives the next task; None if there is none, or none before another task is done.
NextTask = Callable[[], Task | None]


@dataclass(frozen=True)
class EvaluationSpec:
    """The arguments of a model to merge and score. `options` are keyword arguments of Gemma2.from_merge."""

    recipe: str
    scoring: Scoring
    device: str
    numerics: str
    options: dict[str, Any] = field(default_factory=dict)


class LocalEvaluator:
    """Scores candidates in this process, one after another."""

    def __init__(self, spec: EvaluationSpec) -> None:
        from arcmerge.gemma2.model import Gemma2

        self._scoring = scoring = spec.scoring
        self._model = Gemma2.from_merge(spec.recipe, spec.device, spec.numerics, **spec.options)
        if scoring.race is not None:
            self._items = scoring.items_score.items(self._model)
            self._order = order_of(len(self._items), scoring.race)
            self._merged: Mapping[str, Any] | None = None

    def evaluate(self, next_task: NextTask) -> Iterator[Scored]:
        """Yields candidates as they are scored, and takes the next one after each."""
        while (task := next_task()) is not None:
            yield self.score(*task)

    def score(self, candidate: Candidate, rival: Rival | None = None) -> Scored:
        started = time.monotonic()
        variants: list[dict[str, Any]] = [{**candidate.parameters, "seed": seed} for seed in self._scoring.seeds]
        variants = variants or [dict(candidate.parameters)]
        if self._scoring.race is None:
            return Scored.of(candidate, seconds=time.monotonic() - started, **self._score(variants))
        begun = candidate if isinstance(candidate, Scored) else Scored.of(candidate, math.nan, 0.0)
        found = self._race(begun, variants, rival)
        return replace(begun, seconds=begun.seconds + time.monotonic() - started, **found)

    def _score(self, variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The scores of the variants of a candidate, one for each seed."""
        found = []
        for parameters in variants:
            self._model.set_parameters(**parameters)
            found.append([score(self._model) for score in self._scoring.scores])
        means = [fmean(values) for values in zip(*found, strict=True)]
        return {"score": means[0], "also": means[1:], "by_seed": self._by_seed([values[0] for values in found])}

    def _race(self, begun: Scored, variants: Sequence[Mapping[str, Any]], rival: Rival | None) -> dict[str, Any]:
        """Score the items of the first look; or those that follow, until the candidate is worse than its rival."""
        score, items = self._scoring.items_score, self._items
        losses, amount = list(begun.losses), begun.amount
        sums = np.array(begun.by_seed or [sum(losses)] * len(variants), np.float64)
        while True:
            block = self._next_block(len(losses), rival, len(variants))
            rows = np.array([self._losses(parameters, block) for parameters in variants])
            losses += rows.mean(axis=0).tolist()
            sums += rows.sum(axis=1)
            amount += len(variants) * sum(items[index].size for index in block)
            found = {"losses": losses, "items": len(items), "amount": amount}
            if len(losses) == len(items):
                by_seed = [score.of_losses([total], items) for total in sums.tolist()]
                return {**found, "score": fmean(by_seed), "by_seed": self._by_seed(by_seed)}
            difference, evidence = rival.compare(np.array(losses)) if rival else (0.0, -math.inf)
            is_certain = rival is not None and evidence >= rival.threshold
            if len(losses) == len(block) or (is_certain and difference > 0):
                return {**found, "by_seed": self._by_seed(sums.tolist())}
            if is_certain:  # better beyond doubt
                rival = None

    def _losses(self, parameters: Mapping[str, Any], block: Sequence[int]) -> list[float]:
        """The losses of some items for a variant, which is merged unless the model is this one already."""
        if parameters != self._merged:
            self._merged = None
            self._model.set_parameters(**parameters)
            self._merged = parameters
        return self._scoring.items_score.losses(self._model, [self._items[index] for index in block])

    def _next_block(self, done: int, rival: Rival | None, variants: int) -> list[int]:
        """The items that are scored before the next look: all that are left, if no other look can stop the candidate.

        Variants are merged for every block, so several ones have blocks that grow.
        """
        rest, size = self._order[done:], 0
        least = done // 2 if done and variants > 1 else first_look(len(self._items)) - done
        limit = 0 if rival is None else rival.limit
        for count, index in enumerate(rest, 1):
            size += self._items[index].size
            if size >= self._scoring.items_score.block and count >= least and (not done or done + count <= limit):
                return rest[:count]
        return rest

    def _by_seed(self, values: Sequence[float]) -> Sequence[float]:
        return values if self._scoring.seeds else ()


class RayEvaluator:
    """Scores candidates in the actors of a Ray cluster: one actor per GPU, or per `threads` processors without GPUs.

    The cluster is the one that RAY_ADDRESS names, or this machine. All machines must find the models under the same
    paths. If an actor dies, another one scores its candidate again.
    """

    def __init__(self, spec: EvaluationSpec) -> None:
        with needed("ray", by="--ray", extra="ray"):
            import ray
        self._ray: Any = ray
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        machines: list[dict[str, float]] = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = [machine for machine in machines if machine.get("GPU", 0) >= 1]
        if spec.device.startswith("cuda") and not gpus:
            raise ArcmergeError(
                f"'device' must be one that the cluster has, got {spec.device} and no GPU; use --device cpu"
            )
        self._on_gpus = bool(gpus) and spec.device != "cpu"
        if self._on_gpus:  # the processors that an actor can have next to each GPU
            available = int(min(machine.get("CPU", 0) // machine["GPU"] for machine in gpus))
        else:
            available = int(max(machine.get("CPU", 0) for machine in machines))
        self._threads = max(1, min(spec.options.get("threads") or available, available))
        kind, each = ("GPU", 1) if self._on_gpus else ("CPU", self._threads)
        self._count = sum(int(machine.get(kind, 0)) // each for machine in machines)
        if not self._count:
            raise ArcmergeError("'--ray' must find a processor or a GPU, got a cluster without; add machines to it")
        options = {name: value for name, value in spec.options.items() if name != "warn"}
        # Each actor sees one GPU only, which is its cuda:0 whatever index the machine gives it.
        self._spec = replace(spec, device=spec.device.partition(":")[0], options=options)

    def evaluate(self, next_task: NextTask) -> Iterator[Scored]:
        """Yields candidates in the order in which they are scored, and takes a task whenever an actor is idle."""
        ray, waiting = self._ray, deque[Task]()
        idle = deque(self._actor() for _ in range(self._count))
        working: dict[Any, tuple[Any, Task]] = {}
        deaths: Counter[str] = Counter()
        try:
            while True:
                while idle and (task := waiting.popleft() if waiting else next_task()) is not None:
                    actor = idle.popleft()
                    working[actor.score.remote(*task)] = actor, task
                if not working:
                    return
                (done, *_), _rest = ray.wait(list(working), num_returns=1)
                actor, task = working.pop(done)
                try:
                    scored = ray.get(done)
                except ray.exceptions.RayActorError as error:
                    if error.actor_init_failed:  # every other actor would fail too
                        *_, reason = str(error).split("ArcmergeError: ")
                        raise ArcmergeError(
                            f"'--ray' must be able to start workers, got an error: {reason.strip()}"
                        ) from error
                    name = task[0].name
                    deaths[name] += 1
                    if deaths[name] >= MAX_DEATHS:
                        raise ArcmergeError(
                            f"'{name}' must be scored by a worker that lives, got {MAX_DEATHS} deaths; see "
                            "Ray's logs, and give the workers more memory"
                        ) from error
                    waiting.append(task)
                    idle.append(self._actor())
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                else:
                    idle.append(actor)
                    yield scored
        finally:
            for actor in [*idle, *(actor for actor, _ in working.values())]:
                ray.kill(actor)

    def _actor(self) -> Any:
        resources = {"num_cpus": self._threads, "num_gpus": int(self._on_gpus)}
        return self._ray.remote(**resources)(_Worker).remote(self._spec, self._threads)


class _Worker(LocalEvaluator):
    """An actor: a LocalEvaluator with threads of its own."""

    def __init__(self, spec: EvaluationSpec, threads: int) -> None:
        import torch  # noqa: F401, so that use_threads sets its threads too

        from arcmerge.threads import use_threads

        use_threads(threads)
        super().__init__(replace(spec, options={**spec.options, "threads": threads}))
