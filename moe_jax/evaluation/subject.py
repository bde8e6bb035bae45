"""A model to evaluate, which scores and continues texts."""

import dataclasses
import functools
from collections.abc import Sequence

import jax

from moe_jax import model
from moe_jax.data import tokenizers
from moe_jax.evaluation import scoring
from moe_jax.evaluation.answers import Answer, Settings, answers
from moe_jax.parallel import distributed


@dataclasses.dataclass(frozen=True)
class Subject:
    """A loaded model with its tokenizer.

    name: how reports call it.
    end_ids: the tokens that end a generated text.
    batch_size: rows per batch, a multiple of the mesh's shards of the batch.
    limit: the largest number of tokens that the model reads at once.
    """

    name: str
    config: model.ModelConfig
    params: dict
    mesh: jax.sharding.Mesh
    tokenizer: tokenizers.Tokenizer
    end_ids: tuple[int, ...]
    batch_size: int
    limit: int

    @functools.cached_property
    def scorer(self) -> scoring.Scorer:
        return scoring.Scorer(self.config, self.mesh, self.batch_size, self.limit)

    def score(self, pairs: Sequence[scoring.Pair], *, progress: bool = True) -> list[scoring.Score]:
        """The score of each pair: see `scoring.Scorer.score`."""
        return self.scorer.score(self.params, pairs, progress=progress)

    def score_texts(self, texts: Sequence[str], *, progress: bool = True) -> list[scoring.Score]:
        """The score of each text as a whole, in windows: see `scoring.windows`."""
        ids = [scoring.ids_of_text(self.tokenizer, text) for text in texts]
        return self.scorer.rolling(self.params, ids, self.tokenizer.bos_id, progress=progress)

    def answer(self, prompts: Sequence[str], settings: Settings, *, progress: bool = True):
        """The answer to each prompt, which also ends at an end token: see `answers.answers`."""
        settings = dataclasses.replace(settings, end_ids=(*settings.end_ids, *self.end_ids))
        found: list[Answer] = answers(
            self._params_of_one_device,
            self.config,
            self.tokenizer,
            prompts,
            settings,
            batch_size=self.batch_size,
            limit=self.limit,
            progress=progress,
        )
        return found

    @functools.cached_property
    def _params_of_one_device(self) -> dict:
        if self.mesh.size == 1:
            return self.params
        return jax.device_put(distributed.whole(self.params), jax.local_devices()[0])
