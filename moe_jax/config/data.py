"""The section `data`: the text of a run and how it becomes rows."""

import dataclasses
import re
from collections.abc import Iterator

from moe_jax.config import checks
from moe_jax.config.checks import NOT_NEGATIVE, POSITIVE, SHARE, one_of
from moe_jax.config.mixture import Mixture
from moe_jax.config.objectives import TEXT
from moe_jax.config.section import Section, key, part
from moe_jax.data.packings import PACKINGS
from moe_jax.model.fields import Need

# A folder that prepare_data has made holds tokens, labels and splits already.
READ = Need(
    lambda run: any(not s.startswith("prepared:") for s in run.data.named_sources.values()),
    "a config.data.source that is not prepared",
)
TALKS = Need(lambda run: run.data.conversations, "config.data.conversations=True")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Section, path="data", fixed=True):
    source: str = key(
        "embedded",
        "embedded, instructions, tfds:NAME, hf:NAME, prepared:FOLDER, or a path or glob of files; "
        "{name} in it is replaced by the name of each source of data.mixture",
    )
    mixture: Mixture = part(Mixture)
    tokenizer: str = key(
        "",
        "bytes, or the path of a tokenizer.json, a SentencePiece model or a folder with one; empty "
        "uses that of init.source, or bytes if there is none",
        fixed=False,  # a moved file is the same tokenizer; the tokens themselves are compared
    )
    other_tokenizer: bool = key(
        False,
        "allows a tokenizer other than that of init.source, which the embeddings belong to",
        fixed=False,
    )
    other_text: bool = key(
        False, "allows a run to go on with another text than it began with", fixed=False
    )
    conversations: bool = key(
        False, "records are conversations, of which the assistant's turns are trained"
    )
    chat_template: str = key(
        "",
        "Jinja file that makes text of a conversation, or plain; empty uses that beside the "
        "tokenizer, or plain for bytes",
        None,
        TALKS,
        fixed=False,  # the tokens themselves are compared
    )
    sequence_length: int = key(
        256, "tokens per sequence; 0 uses the model's limit, at most 4096", NOT_NEGATIVE
    )
    packing: str = key(
        "concat",
        "concat cuts documents wherever a row is full; first_fit and best_fit cut only documents "
        "longer than a row, and pad rows",
        one_of(*PACKINGS),
        TEXT,
    )
    document_mask: bool = key(
        True, "False lets the tokens of a row attend to other documents", None, TEXT
    )
    reset_positions: bool = key(
        True, "False counts positions over a row, not over each document", None, TEXT
    )
    workers: int = key(
        0, "processes that make batches; 0 uses threads of this one", NOT_NEGATIVE, fixed=False
    )
    validation_fraction: float = key(
        0.05, "share of documents to hold out if no file or split is named validation", SHARE, READ
    )
    skip_batches: tuple = key(
        (),
        "(first, last) pairs of numbers of batches that are left out; without any, step N trains "
        "on batch N - 1",
        checks.ranges,
        fixed=False,
    )
    max_line: int = key(
        30_000_000,
        "most characters of a line of .jsonl or a record's text; a longer one is refused, for it "
        "has to fit into memory several times",
        POSITIVE,
        READ,
        fixed=False,
    )
    text_field: str = key(
        "text",
        "field of a record that has its text; a dot leads into a field: meta.text",
        None,
        READ,
    )
    label_field: str = key(
        "", "field of a record by which losses are reported; empty: language, or lang", None, READ
    )
    label_pattern: str = key(
        "",
        "regular expression whose first group, found in a file's name or folder, is the label of "
        "its records that have none of their own",
        checks.pattern,
        READ,
    )
    skip_damaged: int = key(
        0,
        "most records that may be skipped because they cannot be used; each is counted, and with 0 "
        "the first is refused",
        NOT_NEGATIVE,
        READ,
        fixed=False,  # the tokens themselves are compared
    )
    cache_dir: str = key(
        "", "folder for tokens and compiled steps; empty uses the user's cache folder", fixed=False
    )

    @property
    def named_sources(self) -> dict[str, str]:
        """The text of each source of the mixture by name; a single source has the name ""."""
        specs, names = dict(self.mixture.sources), self.mixture.names
        of_all = {name: self.source.replace("{name}", name) for name in names}
        return {**of_all, **{n: spec for n, spec in specs.items() if spec}} or {"": self.source}

    @property
    def in_words(self) -> str:
        """A line for people about the text that the run is trained on."""
        named = [f"{name}: {spec}" if name else spec for name, spec in self.named_sources.items()]
        return ", ".join(named)

    def problems(self) -> Iterator[str]:
        if not self.text_field:
            yield "config.data.text_field is empty; use the name of a field, such as 'text'"
        if self.label_pattern and not re.compile(self.label_pattern).groups:
            yield (
                f"config.data.label_pattern={self.label_pattern!r} has no group; put the part that "
                "is the label into parentheses"
            )
        specs = dict(self.mixture.sources)
        without = [name for name in self.mixture.names if not specs.get(name)]
        if without and "{name}" not in self.source:
            yield (
                f"config.data.mixture: {', '.join(without)} have no text of their own, and "
                f"data.source={self.source!r} has no {{name}} to be replaced; put it in, or give "
                "mixture.sources, or set mixture.shares=() to train on data.source alone"
            )
