"""Lets lm-evaluation-harness 0.4.13 evaluate any model of this project.

This module needs the optional extra [evaluation]; it is imported where it is used.
"""

import collections
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import lm_eval
from lm_eval.api import instance, registry
from lm_eval.api import model as models
from lm_eval.models import utils as model_utils
from lm_eval.tasks import TaskManager

from moe_jax import spelling
from moe_jax.evaluation import scoring
from moe_jax.evaluation.answers import Settings
from moe_jax.evaluation.sampling import GREEDY, Sampling
from moe_jax.evaluation.subject import Subject
from moe_jax.evaluation.task_lists import TASK_LISTS, Task

NAME = "moe_jax"  # of the model in the harness
BATCH_SIZE = 8  # for the harness's --batch_size=auto
NUM_TOKENS = 256  # of an answer whose task does not say how long it may be; as the harness's "hf"
SAMPLING = {"do_sample", "until", "max_gen_toks", *Sampling._fields}


class Adapter(models.LM):
    """A model of ours as the harness's: it scores and continues texts.

    Truncated contexts are counted in `num_cut`.
    """

    def __init__(self, subject: Subject):
        super().__init__()
        self.subject, self.num_cut = subject, 0

    @property
    def tokenizer_name(self) -> str:
        return self.subject.tokenizer.fingerprint

    def loglikelihood(
        self, requests: list[instance.Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is greedy) of each (context, continuation)."""
        tokenizer = self.subject.tokenizer
        pairs = [scoring.pair(tokenizer, *request.args) for request in requests]
        scores = self.subject.score(pairs, progress=not disable_tqdm)
        self.num_cut += sum(score.left_out > 0 for score in scores)
        found = [(score.log_likelihood, score.is_greedy) for score in scores]
        self._keep("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(
        self, requests: list[instance.Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each (text,) in nats."""
        texts = [request.args[0] for request in requests]
        scores = self.subject.score_texts(texts, progress=not disable_tqdm)
        found = [score.log_likelihood for score in scores]
        self._keep("loglikelihood_rolling", requests, found)
        return found

    def generate_until(
        self, requests: list[instance.Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """The answer to each (prompt, settings).

        Raises: ValueError for a setting of generation that is not there, such as beams.
        """
        by_settings = collections.defaultdict(list)
        for i, request in enumerate(requests):
            by_settings[json.dumps(request.args[1], sort_keys=True)].append(i)
        found: dict[int, str] = {}
        for indices in by_settings.values():
            prompts = [requests[i].args[0] for i in indices]
            settings = _settings(requests[indices[0]].args[1])
            answers = self.subject.answer(prompts, settings, progress=not disable_tqdm)
            self.num_cut += sum(answer.left_out > 0 for answer in answers)
            found |= {i: answer.text for i, answer in zip(indices, answers, strict=True)}
        in_order = [found[i] for i in range(len(requests))]
        self._keep("generate_until", requests, in_order)
        return in_order

    def _keep(self, name: str, requests: list[instance.Instance], found: list) -> None:
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial(name, request.args, result)


def _settings(given: dict[str, Any]) -> Settings:
    values = model_utils.normalize_gen_kwargs(given, NUM_TOKENS)
    if unknown := sorted(values.keys() - SAMPLING):
        raise ValueError(f"generation with {unknown[0]} is not there; use {sorted(SAMPLING)}")
    drawn = {name: values[name] for name in Sampling._fields if name in values}
    return Settings(
        num_tokens=values["max_gen_toks"],
        stops=tuple(values["until"]),
        sampling=Sampling(**drawn) if values["do_sample"] else GREEDY,
    )


def register(load: Callable[..., Subject]) -> None:
    """Adds the model "moe_jax" to the harness's table of models.

    Its arguments are those of `load`, which is called with the checkpoint's name, and the harness's
    batch size; a device is JAX's to choose.
    """

    class Loaded(Adapter):
        def __init__(
            self,
            checkpoint: str,
            batch_size: int | str = BATCH_SIZE,
            max_batch_size: int | None = None,
            device: str | None = None,
            **options,
        ):
            rows = BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
            super().__init__(load(str(checkpoint), batch_size=rows, **options))

    registry.register_model(NAME)(Loaded)


def manager_of(
    tasks: Sequence[Task], include_path: str | None, num_fewshot: int | None, limit: int | None
) -> TaskManager:
    """The harness's table of tasks, after a check of what `run` gets: a model loads slowly.

    Args:
      include_path: a folder with YAML files of more tasks.

    Raises: ValueError for a task that the harness does not have, a folder that is not there, and
      numbers out of range.
    """
    if include_path is not None and not pathlib.Path(include_path).is_dir():
        raise ValueError(f"--include_path={include_path} is not a folder")
    for name, number, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1)):
        if number is not None and number < least:
            raise ValueError(f"--{name}={number} must be at least {least}")
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task.name not in manager.all_tasks:
            near = spelling.did_you_mean(task.name, [*TASK_LISTS, *manager.all_tasks])
            raise ValueError(
                f"--tasks={task.name} is no task of lm-evaluation-harness {lm_eval.__version__}"
                f"{near}; the command harness lists all: harness ls tasks"
            )
    return manager


def run(
    subject: Subject,
    tasks: Sequence[Task],
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The harness's results by task, and what was counted.

    Args:
      num_fewshot: replaces the number of shots of all tasks.
      limit: the number of items of each task; None is all.
    """
    adapter = Adapter(subject)
    by_shots = collections.defaultdict(list)
    for task in tasks:
        by_shots[task.shots if num_fewshot is None else num_fewshot].append(task.name)
    papers = {task.name: task.metric for task in tasks}
    results: dict[str, Any] = {}
    for shots, names in by_shots.items():
        found = lm_eval.simple_evaluate(
            model=adapter,
            tasks=names,
            num_fewshot=shots,
            limit=limit,
            log_samples=False,
            task_manager=manager,
        )
        for name, values in found["results"].items():
            measured = {k: v for k, v in values.items() if isinstance(v, int | float)}
            shots_of = found["n-shot"].get(name)
            own = {"shots": shots_of, "papers_measure": papers.get(name, ""), **measured}
            results[name] = {"n": found["n-samples"].get(name, {}).get("effective"), **own}
    return {
        "checkpoint": subject.name,
        "harness": lm_eval.__version__,
        "contexts_cut": adapter.num_cut,
        "results": results,
    }
