"""TFDS builders over the package's compressed JSON Lines. Licences: LICENSES.md beside them."""

import json
import lzma
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from moe_jax.data.document import TEST, TRAIN, VALIDATION, is_held_out

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
    SPLITS: tuple[str, ...] = (TRAIN, VALIDATION)

    def _info(self):
        return information(self, "MPL-2.0", "text", "language", "doc", "domain")

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download: the text is in the package
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _split_of(self, page: str) -> str:
        return VALIDATION if is_held_out(page, HELD_OUT) else TRAIN

    def _generate_examples(self, split):
        for record in records("lo_parallel19"):
            if self._split_of(record["doc"]) == split:
                key = f"{record['doc']} {record['lang']}"
                features = {name: record[name] for name in ("text", "doc", "domain")}
                yield key, {**features, "language": record["lang"]}


class LoParallel19Sealed(LoParallel19):
    """The same pages, of which 13 that `LoParallel19` trains on are a test split.

    Its validation split is that of `LoParallel19`, by which learning rates and sizes were chosen
    here; nothing was chosen by the test split.
    """

    VERSION = tfds.core.Version("1.0.0")
    SPLITS = (*LoParallel19.SPLITS, TEST)

    def _split_of(self, page):
        split = super()._split_of(page)
        return TEST if split == TRAIN and is_held_out(f"sealed {page}", HELD_OUT / 2) else split


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
