"""Any text of the user's as a TFDS dataset of ArrayRecord files, without TensorFlow.

    builder = text_corpus.text_corpus("path/to/folder", "mine")
    builder.download_and_prepare()
    records = builder.as_data_source("train")  # {"text": b"...", "language": b"..."}

It is then `data.source="tfds:text_corpus/mine"`.
"""

import dataclasses
import pathlib

import tensorflow_datasets as tfds
from absl import logging

from moe_jax.data import cache, policy, sources
from moe_jax.data.corpora import builders
from moe_jax.data.document import TRAIN, VALIDATION


@dataclasses.dataclass(kw_only=True)
class TextCorpusConfig(tfds.core.BuilderConfig):
    """A text of the user's: the arguments of `sources.documents`, and its fingerprint."""

    source: str = ""
    validation_fraction: float = 0.05
    reading: policy.Reading = policy.STRICT
    fingerprint: str = ""


class TextCorpus(tfds.core.GeneratorBasedBuilder):
    """Text files, JSON Lines, Parquet, Arrow or ArrayRecord files as a TFDS dataset.

    `text_corpus` makes one; it can be read by its name when it has been prepared.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: list = []

    def _info(self):
        facts = tfds.core.MetadataDict(fingerprint=self.builder_config.fingerprint)
        return builders.information(self, "unknown", "text", "language", metadata=facts)

    def _split_generators(self, dl_manager):
        del dl_manager  # the files are read where they are
        splits = (TRAIN, VALIDATION) if self.builder_config.validation_fraction else (TRAIN,)
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split):
        config = self.builder_config
        documents = sources.documents(
            *(config.source, split),
            validation_fraction=config.validation_fraction,
            data_dir=self._data_dir_root,
            reading=config.reading,
            skipped=(skipped := policy.Skipped(config.reading.skip_damaged)),
        )
        number = -1
        for number, document in enumerate(documents):
            yield number, {"text": document.text, "language": document.label}
        if number < 0:
            lost = f", and {skipped.in_words}" if skipped.by_reason else ""
            raise ValueError(
                f"{config.source} has no {split} documents{lost}; set validation_fraction to "
                "another value (0 makes no validation split), or give more text"
            )


def text_corpus(
    source: str,
    name: str,
    *,
    data_dir: pathlib.Path | None = None,
    validation_fraction: float = 0.05,
    reading: policy.Reading = policy.STRICT,
) -> TextCorpus:
    """The builder of `text_corpus/NAME`, whose text is that of a `data.source`.

    Args:
      data_dir: where it is prepared; by default, where `data.source="tfds:text_corpus/NAME"` looks.

    Raises: ValueError for a source that cannot be read, or a name that has been given to another.
    """
    sources.check(source)
    folder = pathlib.Path(data_dir or cache.cache_folder("") / cache.DATASETS)
    config = TextCorpusConfig(
        name=name,
        source=source,
        validation_fraction=validation_fraction,
        reading=reading,
        fingerprint=repr([sources.fingerprint(source, folder), validation_fraction, reading.key]),
    )
    said = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS warns of every config that is not in its class
    try:
        builder = TextCorpus(config=config, data_dir=folder, file_format="array_record")
    finally:
        logging.set_verbosity(said)
    if (builder.info.metadata or {}).get("fingerprint") != config.fingerprint:
        raise ValueError(
            f"{builder.data_dir} has been prepared from another text or with other options; give "
            "another name, or delete it"
        )
    return builder
