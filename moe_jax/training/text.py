"""The text of a run: its sources, the stages of their mixture, and what they have given so far."""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax

from moe_jax import config as configs
from moe_jax import model
from moe_jax.config import checks
from moe_jax.config.mixture import EVERY
from moe_jax.data import (
    batches,
    chat,
    mixture,
    policy,
    preferences,
    prepare,
    shares,
    sources,
    tokenizers,
)
from moe_jax.data.cache import DATASETS
from moe_jax.data.corpus import TokenizedCorpus
from moe_jax.data.document import TEST, TRAIN, VALIDATION
from moe_jax.data.mixed import MixedRecords, MixedText, by_label
from moe_jax.data.packing import RowPlan
from moe_jax.data.preferences import PairCorpus, PairPlan
from moe_jax.hf import folders
from moe_jax.parallel import distributed
from moe_jax.training import objective, reference

SINGLE = [shares.Stage(0, {"": 1.0}, {})]  # the stages of a run on one source


@dataclasses.dataclass(frozen=True)
class Text:
    """The tokenized splits of a run's sources, and a plan of rows for each source to train on.

    opened: the corpora of each split, by source.
    digests: those of each split's corpus, by "SOURCE/SPLIT", or by split for a single source.
    test: the test split, if the final evaluation reads it.
    pairs: held-out pairs of answers for an objective on pairs, which trains on pairs too.
    per_document: the loss is a mean over documents, and not over tokens.
    """

    opened: Mapping[str, Mapping[str, TokenizedCorpus]]
    train: MixedRecords | PairCorpus
    held_out: MixedText
    plans: Mapping[str, mixture.Plan]
    stages: Sequence[shares.Stage]  # those of the config
    digests: dict[str, str]
    test: MixedText | None = None
    pairs: PairCorpus | None = None
    per_document: bool = False

    @property
    def columns(self) -> batches.Columns:
        """The arrays of a batch that do not follow from the tokens."""
        if isinstance(self.train, PairCorpus):
            return self.train.columns
        return self.train.columns(per_document=self.per_document)

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """The records of each split that could not be used, by reason."""
        found = {}
        for split, corpora in self.opened.items():
            counts = collections.Counter[str]()
            for corpus in corpora.values():
                counts.update(corpus.skipped)
            found[split] = dict(counts)
        return found

    @property
    def rows_per_epoch(self) -> int:
        """The rows of a single source. Raises: ConfigError for a mixture, which has no epochs."""
        if len(self.plans) > 1:
            raise configs.ConfigError(
                "config.training.num_epochs is for a single source; set training.num_steps for "
                "config.data.mixture"
            )
        return next(iter(self.plans.values())).rows_per_epoch

    @property
    def facts(self) -> str:
        """The facts that must be equal in all processes."""
        stages = [stage.to_json() for stage in self.stages]
        return json.dumps([self.digests, stages], sort_keys=True)


def open_text(settings: configs.Run, tokenizer: tokenizers.Tokenizer, cache: pathlib.Path) -> Text:
    """Opens, and if necessary tokenizes, all sources.

    Raises: ConfigError for a source that cannot be read, and for shares of a label that is not
      there.
    """
    data, row = settings.data, objective.choose(settings.objective.name)
    of_folder = any(folders.is_folder(source.folder) for source in settings.init.sources)
    if data.named_sources == {"": "embedded"} and of_folder:
        distributed.say("config.data.source='embedded' is software help; set it to your own text")
    if row.pairs and data.mixture.is_set:
        raise configs.ConfigError(
            f"config.data.mixture is not for objective.name={settings.objective.name!r}, which "
            "trains on pairs of a single source; set mixture.shares=()"
        )
    with checks.refusing():
        form = chat.form_of(data)
    opened: dict[str, dict[str, TokenizedCorpus]] = {VALIDATION: {}}
    opened |= {} if row.pairs else {TRAIN: {}}
    opened |= {TEST: {}} if settings.evaluation.test_split else {}
    for name, spec in data.named_sources.items():
        with checks.refusing(f"config.data.mixture, source {name}: " if name else ""):
            line = sources.describe(spec, cache / DATASETS)
            distributed.say(f"{name}: {line.removeprefix('data.source=')}" if name else line)
            for split, corpora in opened.items():
                corpora[name] = prepare.open_corpus(
                    *(spec, split, tokenizer),
                    validation_fraction=data.validation_fraction,
                    cache=cache,
                    reading=policy.of_config(data, pairs=row.pairs),
                    form=form,
                )
    if form and not any(text.weighted for found in opened.values() for text in found.values()):
        raise configs.ConfigError(
            f"config.data.conversations=True, but {data.in_words} has been prepared as text; give "
            "the conversations themselves"
        )
    digests = {
        f"{name}/{split}" if name else split: corpus.digest
        for split, corpora in opened.items()
        for name, corpus in corpora.items()
    }
    test = MixedText(opened[TEST]) if TEST in opened else None
    if row.pairs:
        pairs = _open_pairs(settings, tokenizer, cache, form)
        length, seed = data.sequence_length, settings.seed
        by_name = {"": PairPlan(pairs[TRAIN].pairs, sequence_length=length, seed=seed)}
        held_out, digests = MixedText(opened[VALIDATION]), digests | {TRAIN: pairs[TRAIN].digest}
        return Text(
            *(opened, pairs[TRAIN], held_out, by_name, SINGLE, digests, test, pairs[VALIDATION])
        )
    named = by_label(opened[TRAIN]) if data.mixture.by_label else opened[TRAIN].items()
    train = MixedRecords(dict(named))
    plans = {
        name: RowPlan(
            part.pairs,
            sequence_length=data.sequence_length,
            seed=mixture.seed_of(name, settings.seed),
            packing=data.packing,
        )
        for name, part in train.sources.items()
    }
    if form and data.packing == "concat":
        distributed.say(
            "data.packing=concat cuts conversations wherever a row is full; set "
            "data.packing=best_fit to keep those whole that fit into a row"
        )
    for name, plan in plans.items() if data.packing != "concat" else ():
        beginning = f"{name}: " if name else ""
        distributed.say(
            f"{beginning}data.packing={data.packing}: {plan.padding:.2%} of the rows is padding"
        )
    stages = _stages(data.mixture, train, plans)
    per_document = settings.objective.average == "document"
    held_out = MixedText(opened[VALIDATION])
    return Text(*(opened, train, held_out, plans, stages, digests, test), per_document=per_document)


def _open_pairs(
    settings: configs.Run,
    tokenizer: tokenizers.Tokenizer,
    cache: pathlib.Path,
    form: chat.Form | None,
) -> dict[str, PairCorpus]:
    """The pairs of answers of each split. Raises: ConfigError for a source without any."""
    data, row = settings.data, objective.choose(settings.objective.name)
    found = {}
    for split in (TRAIN, VALIDATION):
        with checks.refusing():
            found[split] = pairs = preferences.open_pairs(
                *(data.source, split, tokenizer),
                sequence_length=data.sequence_length,
                validation_fraction=data.validation_fraction,
                cache=cache,
                reading=policy.of_config(data, pairs=True),
                form=form,
            )
        counts = ", ".join(f"{name}: {number:,}" for name, number in pairs.counts.items())
        distributed.say(f"{split} {counts}")
        if pairs.unpaired and not row.unpaired:
            raise configs.ConfigError(
                f"config.objective.name={settings.objective.name!r} is on pairs, and "
                f"{pairs.unpaired:,} prompts of data.source={data.source!r} have one answer; use "
                '\'kto\', or give "chosen" and "rejected"'
            )
    return found


def with_steps(settings: configs.Run, text: Text) -> configs.Run:
    """The settings with a number of steps, in place of `training.num_epochs` if that is set.

    Raises: ConfigError for settings that do not fit the steps, such as a longer warmup.
    """
    epochs = settings.training.num_epochs
    if not epochs:
        return settings
    found = settings.with_rows_per_epoch(text.rows_per_epoch)
    steps = f"training.num_steps={found.training.num_steps:,}"
    distributed.say(f"training.num_epochs={epochs:g} of {text.rows_per_epoch:,} rows is {steps}")
    return found


def with_reference(
    settings: configs.Run,
    text: Text,
    mesh: jax.sharding.Mesh,
    cache: pathlib.Path,
    frozen: dict[str, model.ModelConfig],
    params: dict[str, dict],
) -> tuple[Text, dict[str, model.ModelConfig], dict[str, dict]]:
    """The text with the log-probabilities of its pairs under the frozen model "reference", and the
    frozen models that the steps still need. Any other text is returned as it is.

    Those of held-out pairs are always computed beforehand, those of the pairs to train on unless
    `objective.preference.reference_log_probs` is "frozen".
    """
    train = text.train
    if text.pairs is None or not isinstance(train, PairCorpus):
        return text, frozen, params

    def known(pairs: PairCorpus) -> PairCorpus:
        return reference.with_reference(
            *(pairs, frozen["reference"], params["reference"], mesh),
            cache=cache,
            sequence_length=settings.data.sequence_length,
            batch_size=settings.evaluation.batch_size,
        )

    with checks.refusing():
        text = dataclasses.replace(text, pairs=known(text.pairs))
        if settings.objective.preference.reference_log_probs == "frozen":
            return text, frozen, params
        return dataclasses.replace(text, train=known(train)), {}, {}


def _stages(
    settings: configs.Mixture, train: MixedRecords, plans: Mapping[str, mixture.Plan]
) -> list[shares.Stage]:
    """The stages that a config asks for. Raises: ConfigError if no source is left."""
    if not settings.is_set:
        return SINGLE
    for line in settings.unknown(tuple(plans)):
        raise configs.ConfigError(line)
    sizes, few = {}, []
    for name, part in train.sources.items():
        if (documents := sum(part.documents_per_label)) >= settings.minimum_documents:
            sizes[name] = shares.Size(part.num_tokens, documents)
        else:
            few.append(f"{name} ({documents:,})")
    if few:
        least = settings.minimum_documents
        distributed.say(f"left out for fewer than {least:,} documents: {', '.join(few)}")
    if not sizes:
        raise configs.ConfigError(
            f"config.data.mixture.minimum_documents={settings.minimum_documents} leaves out all "
            "sources; lower it"
        )
    weights = shares.WEIGHTS[settings.weights].of(dict(settings.shares), sizes, settings.exponent)
    epochs = dict(settings.most_epochs)
    most_rows = {
        name: int(limit * plan.rows_per_epoch)
        for name, plan in plans.items()
        if (limit := epochs.get(name, epochs.get(EVERY))) is not None
    }
    every = [(0, weights), *((step, dict(own)) for step, own in settings.stages)]
    stages = [shares.Stage(step, shares.normalised(w), most_rows) for step, w in every]
    without = [name for name in sizes if not any(name in stage.shares for stage in stages)]
    if without:
        distributed.say(f"held-out text only, for they have no share: {', '.join(without)}")
    return stages


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a run: those that its checkpoint says were seen, and those of its config."""

    text: Text
    stages: Sequence[shares.Stage]
    plan: mixture.MixturePlan
    batch_size: int
    left_out: batches.Ranges

    def to_json(self) -> list:
        """The stages, as a checkpoint keeps them."""
        return [stage.to_json() for stage in self.stages]

    def row(self, step: int) -> dict:
        """The entry "sources" of a validation row and of result.json: what each source has given up
        to a step; none for a single source.

        Padding is counted by its mean in a pass over the source, so the tokens are exact after
        whole passes only.
        """
        if len(self.text.plans) < 2:
            return {}
        taken = self.plan.schedule.taken_by(
            batches.number(step - 1, self.left_out) + 1 if step else 0,
            self.batch_size,
            self.left_out,
        )
        assert isinstance(self.text.train, MixedRecords)
        epochs, tokens = {}, {}
        for name, plan in self.text.plans.items():
            epochs[name] = taken.get(name, 0) / plan.rows_per_epoch
            tokens[name] = epochs[name] * self.text.train.sources[name].num_tokens
        total = max(math.fsum(tokens.values()), 1)
        return {
            "sources": {
                name: {
                    "share": round(tokens[name] / total, 6),
                    "tokens": round(tokens[name]),
                    "epochs": round(epochs[name], 6),
                }
                for name in tokens
            }
        }


def rows(text: Text, settings: configs.Run, kept: Mapping, start: int) -> Rows:
    """The rows of a run that begins, or goes on, at a step; says what changes in its mixture.

    `kept` is the data of its checkpoint, with the batches that it leaves out.

    Raises: ConfigError if the sources end before the run.
    """
    size, left_out = settings.training.batch_size, tuple(kept["left_out"])
    before = [shares.Stage.of_json(stage) for stage in kept.get("mixture", ())] or SINGLE
    stages, changes = shares.resumed(before, text.stages, batches.number(start, left_out))
    if changes:
        distributed.say(*changes)
    schedule = mixture.Schedule(stages, batch_size=size, seed=settings.seed)
    last = settings.training.last_step
    if (batches.number(last - 1, left_out) + 1) * size > schedule.num_rows:
        ends = sum(batches.number(n, left_out) < schedule.num_rows // size for n in range(last))
        raise configs.ConfigError(
            f"config.data.mixture: the sources have given all that most_epochs allows at step "
            f"{ends}, before the run's last step {last}; raise most_epochs"
            + (f", or set training.num_steps={ends}" if ends > start else "")
        )
    first = text.train.first_record if isinstance(text.train, MixedRecords) else {"": 0}
    plan = mixture.MixturePlan(schedule, text.plans, first)
    return Rows(text, stages, plan, size, left_out)
