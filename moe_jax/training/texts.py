"""The text of a run: what it trains on, in which rows, and what it is evaluated on."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax import config as configs
from moe_jax import model
from moe_jax.config import checks
from moe_jax.data import batches, preferences, prepare, tokenizers
from moe_jax.data.corpus import TokenizedCorpus
from moe_jax.data.packing import RowPlan
from moe_jax.data.preferences import PairCorpus, PairPlan
from moe_jax.hf import folders
from moe_jax.parallel import distributed
from moe_jax.training import objective, reference


@dataclasses.dataclass(frozen=True)
class Text:
    """records: a corpus of text or of pairs of answers, whose rows `plan` makes.
    pairs: held-out pairs for an objective on pairs, None for any other."""

    records: TokenizedCorpus | PairCorpus
    plan: RowPlan | PairPlan
    held_out: TokenizedCorpus
    pairs: PairCorpus | None = None

    @property
    def digests(self) -> dict[str, str]:
        return {"train": self.records.digest, "validation": self.held_out.digest}

    @property
    def columns(self) -> batches.Columns:
        return self.records.columns if isinstance(self.records, PairCorpus) else {}


def open_text(settings: configs.Run, tokenizer: tokenizers.Tokenizer, cache: pathlib.Path) -> Text:
    """The text of `data.source`, tokenized or from the folder `cache`.

    Raises: ConfigError for a source that cannot be read or has too little text.
    """
    data = settings.data
    if data.source == "embedded" and any(
        folders.is_folder(s.folder) for s in settings.init.sources
    ):
        distributed.say("config.data.source='embedded' is software help; set it to your own text")
    options: Mapping[str, Any] = {
        "validation_fraction": data.validation_fraction,
        "cache": cache,
        "max_line": data.max_line,
    }
    open_corpus = functools.partial(prepare.open_corpus, tokenizer=tokenizer, **options)
    held_out = open_corpus(data.source, "validation")
    row = objective.choose(settings.objective.name)
    if not row.pairs:
        records = open_corpus(data.source, "train")
        plan = RowPlan(records.pairs, sequence_length=data.sequence_length, seed=settings.seed)
        return Text(records, plan, held_out)
    found = {
        split: preferences.open_pairs(
            *(data.source, split, tokenizer), sequence_length=data.sequence_length, **options
        )
        for split in ("train", "validation")
    }
    for split, pairs in found.items():
        counts = ", ".join(f"{name}: {number:,}" for name, number in pairs.counts.items())
        distributed.say(f"{split} {counts}")
        if pairs.unpaired and not row.unpaired:
            raise configs.ConfigError(
                f"config.objective.name={settings.objective.name!r} is on pairs, and "
                f"{pairs.unpaired:,} prompts of data.source={data.source!r} have one answer; use "
                '\'kto\', or give "chosen" and "rejected"'
            )
    records = found["train"]
    plan = PairPlan(records.pairs, sequence_length=data.sequence_length, seed=settings.seed)
    return Text(records, plan, held_out, found["validation"])


def with_steps(settings: configs.Run, text: Text) -> configs.Run:
    """The settings with a number of steps, in place of `training.num_epochs` if that is set.

    Raises: ConfigError for settings that do not fit the steps, such as a longer warmup.
    """
    rows, epochs = text.plan.rows_per_epoch, settings.training.num_epochs
    if not epochs:
        return settings
    found = settings.with_rows_per_epoch(rows)
    steps = f"training.num_steps={found.training.num_steps:,}"
    distributed.say(f"training.num_epochs={epochs:g} of {rows:,} rows is {steps}")
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
    if text.pairs is None or not isinstance(text.records, PairCorpus):
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
        return dataclasses.replace(text, records=known(text.records)), {}, {}
