"""One table of evaluators: a run's measurements besides its training loss."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from moe_jax import config as configs
from moe_jax.analysis import measures, similarity
from moe_jax.config import checks
from moe_jax.data import batches, tokenizers
from moe_jax.data.mixed import MixedText
from moe_jax.data.preferences import PairCorpus, PairPlan
from moe_jax.evaluation import (
    generate,
    generated,
    json_lines,
    multiple_choice,
    perplexity,
    preferences,
    scoring,
    text_metrics,
)
from moe_jax.evaluation.samples import Sample
from moe_jax.evaluation.sampling import Sampling
from moe_jax.model.config import ModelConfig
from moe_jax.parallel import distributed, sharding
from moe_jax.parallel import mesh as meshes


@dataclasses.dataclass(frozen=True)
class Context:
    """The run, model and data that evaluators are made from.

    parent: loads the dense parent's parameters and config, as often as it is called, so that they
      take no memory between evaluations; it raises ValueError or OSError if they are gone.
    """

    run: configs.Run
    mesh: jax.sharding.Mesh
    held_out: MixedText
    tokenizer: tokenizers.Tokenizer
    routers_at_start: Mapping[int, np.ndarray]  # kernels by layer, to measure how far they move
    parent: Callable[[], tuple[dict, ModelConfig]] | None = None
    pairs: PairCorpus | None = None  # held-out pairs of answers, with the reference's log-probs
    test: MixedText | None = None  # the test split, if it is evaluated

    @functools.cached_property
    def model(self):
        """The model in evaluation, which may use another number of experts per token."""
        number = self.run.evaluation.num_experts_per_tok or self.run.model.num_experts_per_tok
        return dataclasses.replace(self.run.model, num_experts_per_tok=number)

    @functools.cached_property
    def eval_step(self) -> Callable:
        """The compiled function that computes the sums of a batch of held-out text."""
        return self._eval_step(len(self.held_out.labels))

    def _eval_step(self, num_labels: int) -> Callable:
        eval_step = perplexity.make_eval_step(self.model, num_labels)
        replicated = jax.NamedSharding(self.mesh, jax.P())
        return meshes.under(self.mesh, jax.jit(eval_step, out_shardings=replicated))

    def sums(self, params: dict, text: MixedText, max_batches: int) -> perplexity.Sums:
        """The sums over a text, or over its first batches; 0 is all."""
        fed = batches.feed(
            batches.evaluation_batches,
            text,
            sharding=jax.NamedSharding(self.mesh, sharding.BATCH),
            batch_size=self.run.evaluation.batch_size,
            sequence_length=self.run.data.sequence_length,
            max_batches=max_batches,
            columns=text.columns(),
        )
        same = len(text.labels) == len(self.held_out.labels)
        eval_step = self.eval_step if same else self._eval_step(len(text.labels))
        return perplexity.evaluate(eval_step, params, fed, text.bytes_per_token)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`row` is written to metrics.jsonl, and `result` to result.json when the run ends."""

    row: Mapping[str, object]
    result: Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """`make` returns a function of parameters.

    every: the interval in steps, computed from the config; `evaluation.intervals` can override it.
      With 0 it runs only at the end.
    logged_at_end: its row is written at the end even without an interval.
    """

    make: Callable[[Context], Callable[[dict], Evaluation]]
    every: Callable[[configs.Evaluation], int] = lambda evaluation: 0
    logged_at_end: bool = False


def held_out_loss(context: Context) -> Callable[[dict], Evaluation]:
    """Loss by language and router statistics, on the sample used for the run's loss curve."""
    return _held_out_loss(context, context.run.evaluation.max_batches)


def final_loss(context: Context) -> Callable[[dict], Evaluation]:
    """`held_out_loss` for the final result, on all held-out text unless the config limits it."""
    evaluation = context.run.evaluation
    if evaluation.final_max_batches == evaluation.max_batches:
        return lambda params: Evaluation({}, {})  # `held_out_loss` already reports it
    evaluate = _held_out_loss(context, evaluation.final_max_batches)
    return lambda params: dataclasses.replace(evaluate(params), row={})


def _held_out_loss(context: Context, max_batches: int) -> Callable[[dict], Evaluation]:
    run, held_out = context.run, context.held_out

    def evaluate(params: dict) -> Evaluation:
        measured = context.sums(params, held_out, max_batches)
        found, sums = measured.loss(), None
        losses = {**found.row(), **measured.by_source(held_out.labels_of)}
        row = {"validation": losses}
        if found.router is not None:
            kind, capacity_factor = run.model.router, run.model.capacity_factor
            sums = measures.Sums(found.router, kind, capacity_factor, measures.VALIDATION)
            row["router"] = measures.rows(sums)
        result = {
            **losses,
            **measures.result(sums),
            "byte_unigram_bits": held_out.byte_unigram_bits,
        }
        return Evaluation(row, result)

    return evaluate


def test_loss(context: Context) -> Callable[[dict], Evaluation]:
    """Loss by language on the test split, which no run is trained on and nothing is chosen by."""

    def evaluate(params: dict) -> Evaluation:
        if context.test is None:
            return Evaluation({}, {})
        found = context.sums(params, context.test, max_batches=0).loss()
        return Evaluation({}, {"test": found.row()})

    return evaluate


SAMPLE_METRICS = ("seq_rep_4", "distinct_2", "language_consistency", "words")


def continuations(context: Context) -> Callable[[dict], Evaluation]:
    """Continuations of `evaluation.prompts`, on one device, and those metrics of them that are
    defined and installed (`text_metrics.METRICS`)."""
    run, tokenizer = context.run, context.tokenizer
    prompts = [tokenizer.prompt(prompt) for prompt in run.evaluation.prompts]
    reasons = generated.choose([], given=())
    names = [name for name in SAMPLE_METRICS if not reasons[name]]

    def evaluate(params: dict) -> Evaluation:
        if not prompts:
            return Evaluation({}, {"samples": []})
        ids_of_prompts = generate.generate(
            distributed.whole(params),
            context.model,
            prompts,
            num_tokens=run.evaluation.continuation_tokens,
            sampling=Sampling(temperature=0.7),
            key=jax.random.key(run.seed),
        )
        samples = [
            {"prompt": prompt, "continuation": tokenizer.decode(ids)}
            for prompt, ids in zip(run.evaluation.prompts, ids_of_prompts, strict=True)
        ]
        texts = [Sample(sample["continuation"], sample["prompt"]) for sample in samples]
        measured = generated.measure(texts, names, text_metrics.Tools())[""]
        values = {n: round(v.value, 5) for n, v in measured.items() if not math.isnan(v.value)}
        return Evaluation({"samples": samples}, {"samples": samples, "sample_metrics": values})

    return evaluate


def answers_to_choices(context: Context) -> Callable[[dict], Evaluation]:
    """Accuracies on the items of `evaluation.multiple_choice`, with 95 % intervals.

    Contexts longer than the run's rows lose their first tokens, and are counted.
    """
    run = context.run
    items = _items(run)
    if not items:
        return lambda params: Evaluation({}, {})
    limit = run.data.sequence_length
    scorer = scoring.Scorer(context.model, context.mesh, run.evaluation.batch_size, limit)

    def evaluate(params: dict) -> Evaluation:
        score = functools.partial(scorer.score, params)
        found = multiple_choice.evaluate(items, context.tokenizer, score).report(seed=run.seed)
        return Evaluation({"multiple_choice": found}, {"multiple_choice": found})

    return evaluate


def _items(run: configs.Run) -> list[multiple_choice.Item]:
    path = run.evaluation.multiple_choice
    with checks.refusing("config.evaluation.multiple_choice: "):
        if path:
            generate.independent(run.model)
        return json_lines.read(path, multiple_choice.parse) if path else []


def held_out_pairs(context: Context) -> Callable[[dict], Evaluation]:
    """The measures of `analysis.answers` on held-out pairs, each in its mean over all of them."""
    run, pairs = context.run, context.pairs
    if pairs is None:
        return lambda params: Evaluation({}, {})
    eval_step = preferences.make_eval_step(context.model, run.objective.preference.beta)
    replicated = jax.NamedSharding(context.mesh, jax.P())
    compiled = meshes.under(context.mesh, jax.jit(eval_step, out_shardings=replicated))
    length = run.data.sequence_length

    def evaluate(params: dict) -> Evaluation:
        fed = batches.feed(
            *(batches.one_pass, pairs),
            PairPlan(pairs.pairs, sequence_length=length, seed=0),
            sharding=jax.NamedSharding(context.mesh, sharding.BATCH),
            batch_size=run.evaluation.batch_size,
            columns=pairs.columns,
        )
        found = preferences.evaluate(compiled, params, fed)
        return Evaluation({"preferences": found}, {"preferences": found})

    return evaluate


def expert_similarity(context: Context) -> Callable[[dict], Evaluation]:
    """Similarity of the experts, and the routers' distance from their initial values."""
    config = context.run.model

    def evaluate(params: dict) -> Evaluation:
        drift = similarity.router_drift(
            dict(context.routers_at_start), similarity.routers(params, config)
        )
        found = {
            "expert_similarity": similarity.of_layers(params, config),
            "router_drift": [round(row.distance, 5) for row in drift],
        }
        return Evaluation(found if config.num_experts else {}, found)

    return evaluate


PARENT = "parent_similarity"


def parent_similarity(context: Context) -> Callable[[dict], Evaluation]:
    """Similarity of the experts to the dense parent and their distance from it, by sparse layer.

    Its row is empty for a run without such a parent, and from the moment when the parent is gone.
    """
    load = None if _lacks_parent(context.run) else context.parent

    def evaluate(params: dict) -> Evaluation:
        nonlocal load
        if load is None:
            return Evaluation({}, {})
        try:
            parent = load()
        except (ValueError, OSError) as error:
            distributed.say(f"{PARENT} is not measured any more: {error}")
            load = None
            return Evaluation({}, {})
        found = similarity.to_parent(params, context.run.model, parent)
        return Evaluation(found, found)

    return evaluate


def _lacks_parent(run: configs.Run) -> str:
    """Why the experts have no dense parent to be compared with; "" if they have one."""
    sources = run.init.sources
    if not run.model.num_experts or not run.init.upcycle.recipe:
        return "the run is not upcycled from a dense model (config.init.upcycle.recipe)"
    if len(sources) > 1:
        return f"config.init.source names {len(sources)} parents, not one"
    try:
        parent = configs.model_of(sources[0].folder)
    except (ValueError, OSError):  # a run that goes on may have lost it
        return ""
    try:
        similarity.check_parent(run.model, parent, of_width=True)
    except ValueError as error:
        return str(error)
    return ""


EVALUATORS: dict[str, Evaluator] = {
    "held_out_loss": Evaluator(
        held_out_loss, every=lambda evaluation: evaluation.every_steps, logged_at_end=True
    ),
    "final_loss": Evaluator(final_loss),
    "test_loss": Evaluator(test_loss),
    "multiple_choice": Evaluator(
        answers_to_choices,
        every=lambda evaluation: evaluation.every_steps if evaluation.multiple_choice else 0,
        logged_at_end=True,
    ),
    "held_out_pairs": Evaluator(
        held_out_pairs, every=lambda evaluation: evaluation.every_steps, logged_at_end=True
    ),
    "expert_similarity": Evaluator(expert_similarity),
    PARENT: Evaluator(
        parent_similarity, every=lambda evaluation: evaluation.every_steps, logged_at_end=True
    ),
    "continuations": Evaluator(continuations),
}


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """An evaluator of a run, which the loop calls every `every` steps and at the end."""

    evaluate: Callable[[dict], Evaluation]
    every: int  # 0 means only at the end
    logged_at_end: bool

    def is_due(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0


def schedule(context: Context) -> dict[str, Scheduled]:
    """All evaluators of a run, by name."""
    every = intervals(context.run.evaluation)
    return {
        name: Scheduled(evaluator.make(context), every[name], evaluator.logged_at_end)
        for name, evaluator in EVALUATORS.items()
    }


def check(run: configs.Run) -> None:
    """Refuses a run whose evaluators cannot be made.

    Raises: ConfigError for a name that is not in the table, for items of multiple choice that
      cannot be read, or a model that cannot score them, and for an interval of parent_similarity in
      a run without a parent to be compared with.
    """
    intervals(run.evaluation)
    _items(run)
    if dict(run.evaluation.intervals).get(PARENT) and (reason := _lacks_parent(run)):
        raise configs.ConfigError(
            f"config.evaluation.intervals has {PARENT!r}, but {reason}; leave it out"
        )


def intervals(evaluation: configs.Evaluation) -> dict[str, int]:
    """The interval in steps of each evaluator.

    Raises: ConfigError for a name in `evaluation.intervals` that is not in the table.
    """
    chosen = dict(evaluation.intervals)
    known = ", ".join(EVALUATORS)
    for name in chosen.keys() - EVALUATORS.keys():
        raise configs.ConfigError(
            f"config.evaluation.intervals names {name!r}; the evaluators are {known}"
        )
    return {name: row.every(evaluation) for name, row in EVALUATORS.items()} | chosen
