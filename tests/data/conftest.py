"""A corpus that the tests of this folder share."""

import pytest

from moe_jax.data import shards
from tests.data.test_prepare import RECORD_TOKENS, RECORDS, open_corpus, write


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "RECORD_TOKENS", RECORD_TOKENS)
        corpus = open_corpus(write(folder / "text.jsonl"), folder)
    assert len(corpus.pairs) > len(RECORDS)
    return corpus
