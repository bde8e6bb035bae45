"""One table of metrics of generated text that need no reference text.

They follow the families of the survey by Ito, van Deemter and Suzuki (arXiv 2501.12011) that need
no trained estimator.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moe_jax.evaluation import diversity, language_consistency, likelihood
from moe_jax.evaluation import judge as judges
from moe_jax.evaluation import samples as sample_files
from moe_jax.evaluation.samples import Sample

LOWER, HIGHER, HUMAN = "lower", "higher", "as human text"


@dataclasses.dataclass(frozen=True)
class Tools:
    """What metrics need besides the texts; None for what is not given.

    checkpoint, second: the model that wrote the texts and another one, as scores of texts.
    training_text: returns the texts that the model was trained on, one by one.
    """

    checkpoint: likelihood.Score | None = None
    second: likelihood.Score | None = None
    judge: judges.Judge | None = None
    training_text: Callable[[], Iterable[str]] | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Metric:
    """`measure` returns rows of a numerator and a denominator, [rows, 2]; the metric is `show` of
    the ratio of their sums, and undefined where the denominators are 0.

    whole: it compares texts with each other, so that it is measured again for each label.
      Otherwise `measure` returns a row for each text.
    needs: the field of `Tools` that it needs; "" for none.
    package: the optional package that it imports; "" for none.
    """

    measure: Callable[[Sequence[Sample], Tools], np.ndarray]
    about: str
    better: str
    range: str
    failure: str
    source: str
    whole: bool = False
    needs: str = ""
    package: str = ""
    show: Callable[[float], float] = float


def _words(samples: Sequence[Sample]) -> list[list[str]]:
    return [sample.words for sample in samples]


def _by_model(measure: Callable[[Sequence[Sample], likelihood.Score], np.ndarray], who: str):
    return lambda samples, tools: measure(samples, getattr(tools, who))


def _by_words(measure: Callable[..., np.ndarray], **parameters):
    return lambda samples, tools: measure(_words(samples), **parameters)


def _by_judge(name: str, *arguments):
    return lambda samples, tools: getattr(tools.judge, name)(samples, *arguments)


def _novelty(samples: Sequence[Sample], tools: Tools) -> np.ndarray:
    assert tools.training_text
    return diversity.novelty(_words(samples), map(sample_files.words, tools.training_text()))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _likelihood(who: str, model: str) -> dict[str, Metric]:
    """The rows of one model's likelihood; `who` is the field of `Tools`."""
    return {
        f"{model}_perplexity": Metric(
            _by_model(likelihood.after_prompt, who),
            f"exp of the mean negative log-likelihood of a token after the prompt, {who} model",
            HUMAN,
            "1 to infinity",
            "low for dull and repetitive text; of one tokenizer only; a model favours its own "
            "family's texts",
            "Jelinek et al. 1977; Ito et al. 2501.12011",
            needs=who,
            show=_exp,
        ),
        f"{model}_bits_per_byte": Metric(
            _by_model(likelihood.bits_per_byte, who),
            f"bits to encode a byte of text after the prompt, {who} model",
            HUMAN,
            "0 to infinity",
            "as perplexity, but models with different tokenizers compare; languages do not, as "
            "their scripts have other numbers of bytes",
            "Gao et al. 2101.00027",
            needs=who,
        ),
    }


_WELLECK = "Welleck et al. 1908.04319"
_JUDGE = "Kocmi and Federmann 2302.14520; Qian et al. 2410.06338"
METRICS: dict[str, Metric] = {
    # One model's rows stand together, because one model is in memory at a time.
    **_likelihood("checkpoint", "self"),
    "source_log_likelihood": Metric(
        _by_model(likelihood.given_source, "checkpoint"),
        "mean log-probability of a token of the text given its source (else its prompt), in nats; "
        "mean over texts",
        HIGHER,
        "-infinity to 0",
        "rewards copies of the source, and short and frequent words; of one tokenizer only",
        "BARTScore, Yuan et al. 2106.11520",
        needs="checkpoint",
    ),
    **_likelihood("second", "second"),
    **{
        f"seq_rep_{n}": Metric(
            _by_words(diversity.seq_rep, n=n),
            f"1 - distinct {n}-grams / {n}-grams within a text; mean over texts (in other papers "
            f"rep-{n})",
            LOWER,
            "0 to 1",
            "grows with the length of a text; noise has 0; lists and code repeat with reason",
            _WELLECK,
        )
        for n in (2, 3, 4)
    },
    "rep_128": Metric(
        _by_words(diversity.rep),
        f"share of words that are among the {diversity.LAST_WORDS} words before them (rep/l)",
        HUMAN,
        "0 to 1",
        "grammatical words repeat in every good text, so 0 is no aim; short texts have less",
        _WELLECK,
    ),
    **{
        f"distinct_{n}": Metric(
            _by_words(diversity.distinct, n=n),
            f"distinct {n}-grams / {n}-grams of all texts together",
            HUMAN,
            "0 to 1",
            "falls with the amount of text, so compare equal amounts only; noise has 1",
            "Li et al. 1510.03055",
            whole=True,
        )
        for n in (1, 2, 3)
    },
    "self_bleu": Metric(
        lambda s, tools: diversity.self_bleu(_words(s), tools.seed),
        f"BLEU-4 of a text with the other texts as references (of {diversity.MAX_TEXTS} texts at "
        "most)",
        HUMAN,
        "0 to 1",
        "grows with the number of texts; sees no paraphrase; noise has 0",
        "Zhu et al. 1802.01886",
        whole=True,
        package="sacrebleu",
    ),
    "compression": Metric(
        lambda s, tools: diversity.compression([sample.text for sample in s]),
        "bytes of all texts / bytes compressed by zlib",
        HUMAN,
        "about 0.5 to 1000",
        "grows with the amount of text; sees repetition within 32 KB only; depends on the script",
        "Shaib et al. 2403.00553",
        whole=True,
    ),
    "language_consistency": Metric(
        lambda s, tools: language_consistency.consistency(s),
        "share of texts in the language of the record, or else of the prompt; of those whose "
        "languages are determined",
        HIGHER,
        "0 to 1",
        "takes relatives for each other (es and gl, id and ms); code and mixed text get a language",
        "py3langid (Lui and Baldwin, ACL 2012)",
        package="py3langid",
    ),
    "language_undetermined": Metric(
        lambda s, tools: language_consistency.undetermined(s),
        "share of texts whose language, or that of the prompt, is not determined",
        LOWER,
        "0 to 1",
        "short texts, numbers and noise are all undetermined",
        "py3langid (Lui and Baldwin, ACL 2012)",
        package="py3langid",
    ),
    "words": Metric(
        lambda s, tools: diversity.mean(len(words) for words in _words(s)),
        "mean number of words and marks of a text",
        HUMAN,
        "0 to infinity",
        "a limit on generated tokens cuts it; many quality scores follow it",
        "Ito et al. 2501.12011",
    ),
    "words_median": Metric(
        lambda s, tools: diversity.median([len(words) for words in _words(s)]),
        "median number of words and marks of a text",
        HUMAN,
        "0 to infinity",
        "as words",
        "Ito et al. 2501.12011",
        whole=True,
    ),
    "empty": Metric(
        lambda s, tools: diversity.mean(float(not words) for words in _words(s)),
        "share of texts without a word",
        LOWER,
        "0 to 1",
        "most metrics leave these texts out, so read it beside them",
        "Ito et al. 2501.12011",
    ),
    f"novelty_{diversity.NOVEL_WORDS}": Metric(
        _novelty,
        f"share of a text's {diversity.NOVEL_WORDS}-grams that the training text does not have",
        HUMAN,
        "0 to 1",
        "noise has 1; a copy with one other word in five has 1 too",
        "McCoy et al. 2111.09509",
        needs="training_text",
    ),
    "judge_score": Metric(
        _by_judge("scores"),
        "score that a model gives when it is asked; mean over its answers that have one",
        HIGHER,
        "`--judge_scale`",
        "depends on wording, place and length; favours the judge's own texts; obeys a text that "
        "tells it what to answer",
        _JUDGE,
        needs="judge",
    ),
    "judge_disagreement": Metric(
        _by_judge("disagreement"),
        "range of a text's scores over the templates, as a share of the scale",
        LOWER,
        "0 to 1",
        "0 for a judge that answers one number to everything",
        _JUDGE,
        needs="judge",
    ),
    **{
        f"judge_{kind.name.lower()}": Metric(
            _by_judge("share", kind),
            f"share of the judge's answers that are {text}",
            LOWER,
            "0 to 1",
            failure,
            _JUDGE,
            needs="judge",
        )
        for kind, text, failure in (
            (judges.Kind.REFUSAL, "refusals", "sees English refusals only"),
            (
                judges.Kind.UNPARSABLE,
                "empty, without a number, or with several",
                "counts refusals in other languages, and numbers in words",
            ),
            (
                judges.Kind.OUT_OF_RANGE,
                "numbers outside the scale",
                "counts numbers that are no scores",
            ),
            (
                judges.Kind.CUT,
                "missing, because the question is longer than the judge can read",
                "long texts are not judged, so the scores are of the short ones",
            ),
        )
    },
}


def card() -> str:
    """The metrics as a Markdown table."""
    head = ("metric", "computed as", "better", "range", "needs", "known failure", "source")
    rows = [
        (f"`{name}`", m.about, m.better, m.range, _needed(m), m.failure, m.source)
        for name, m in METRICS.items()
    ]
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _needed(metric: Metric) -> str:
    return metric.package or (f"`--{metric.needs}`" if metric.needs else "")
