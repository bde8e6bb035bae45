"""Finds the valid name nearest to a misspelt one, and words the error for it."""

import difflib
from collections.abc import Iterable

# Other codebases' names for keys that neither letters nor initials would match.
ELSEWHERE = {
    "top_k": "num_experts_per_tok",
    "topk": "num_experts_per_tok",
    "d_model": "hidden_size",
    "n_embd": "hidden_size",
    "dim": "hidden_size",
    "d_ff": "intermediate_size",
    "n_head": "num_attention_heads",
    "depth": "num_hidden_layers",
    "context_length": "sequence_length",
    "block_size": "sequence_length",
    "aux_loss_coef": "load_balancing_coefficient",
}


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that was probably meant, or None if none is near.

    It is the first match in this order: equal except for case and hyphens; another codebase's name
    for it; the name with these initials (lr: learning_rate); the shortest name that has all its
    words (num_layers: num_hidden_layers) or begins with it; the nearest by letters.
    """
    names = list(names)
    plain = name.lower().replace("-", "_").replace(" ", "_")
    words = {{"n": "num"}.get(word, word) for word in plain.split("_")}
    finders = (
        [n for n in names if n.lower().replace("-", "_") == plain],
        [n for n in names if n == ELSEWHERE.get(plain)],
        [n for n in names if len(plain) > 1 and "".join(w[:1] for w in n.split("_")) == plain],
        sorted((n for n in names if len(words) > 1 and words <= set(n.split("_"))), key=len),
        sorted((n for n in names if len(plain) > 2 and n.startswith(plain)), key=len),
        difflib.get_close_matches(plain, names, n=1),
    )
    return next((found[0] for found in finders if found), None)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The text "; did you mean X?", or "" if no name is near."""
    near = nearest(name, names)
    return f"; did you mean {near}?" if near else ""


def unknown(name: str, value: str, choices: Iterable[str]) -> str:
    """The line that refuses a value that is not one of the choices."""
    choices = list(choices)
    near = nearest(value, choices)
    meant = f": did you mean {near!r}? Use" if near else "; use"
    return f"{name}={value!r} is unknown{meant} one of {', '.join(choices)}"
