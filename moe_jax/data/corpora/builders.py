"""TFDS builders over the package's compressed JSON Lines. Licences: LICENSES.md beside them."""

import json
import lzma
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from moe_jax.data.document import is_held_out

FOLDER = pathlib.Path(__file__).parent
HELD_OUT = 1 / 16  # the fraction of pages used as validation text


def records(name: str) -> Iterator[dict]:
    with lzma.open(FOLDER / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def information(builder, license: str, *features: str, **facts: Any) -> tfds.core.DatasetInfo:
    """The information of a dataset whose features are texts."""
    return tfds.core.DatasetInfo(
        builder=builder,
        description=builder.__doc__,
        license=license,
        features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in features}),
        **facts,
    )


class LoParallel19(tfds.core.GeneratorBasedBuilder):
    """LibreOffice help, 391 pages in 19 languages, parallel by line.

    The held-out pages are the same in all languages: no translation of one is trained on.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return information(self, "MPL-2.0", "text", "language", "doc", "domain")

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download: the text is in the package
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split):
        for record in records("lo_parallel19"):
            if is_held_out(record["doc"], HELD_OUT) == (split == "validation"):
                key = f"{record['doc']} {record['lang']}"
                features = {name: record[name] for name in ("text", "doc", "domain")}
                yield key, {**features, "language": record["lang"]}


class UdhrLanguages(tfds.core.GeneratorBasedBuilder):
    """The Universal Declaration of Human Rights in 71 languages: a probe, too small to train on."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return information(self, "MIT", "text", "language", "name", "family", "branch")

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        for record in records("udhr_languages"):
            yield record["language"], record
