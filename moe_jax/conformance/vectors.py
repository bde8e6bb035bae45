"""Expected losses and gradients of published balance rules, and expected updates of biases.

`vectors.json` holds them in float64. It is made by `tests/conformance/make_vectors.py`, which
computes the published formulas in numpy, without any code of this package.
"""

import dataclasses
import importlib.resources
import json
from typing import Any

import numpy as np

from moe_jax import config as configs
from moe_jax import model


@dataclasses.dataclass(frozen=True)
class Rule:
    """A published loss of router logits, its coefficient included.

    model: its router; `balance`: its settings here. devices: the number of shards of the rows, for
    a rule that is defined per device. coefficients_L: each layer's coefficient, if they differ.
    """

    name: str
    source: str
    model: model.ModelConfig
    balance: configs.Balance
    devices: int
    coefficients_L: np.ndarray | None
    loss: float
    gradient_LBTE: np.ndarray


@dataclasses.dataclass(frozen=True)
class Vectors:
    """updates: inputs and results of the rules outside the gradient, by the names in the file."""

    logits_LBTE: np.ndarray
    mask_BT: np.ndarray
    rules: tuple[Rule, ...]
    updates: dict[str, Any]


def load() -> Vectors:
    text = importlib.resources.files(__package__).joinpath("vectors.json").read_text("utf-8")
    stored = json.loads(text)
    logits_LBTE = np.array(stored["logits"])
    return Vectors(
        logits_LBTE=logits_LBTE,
        mask_BT=np.array(stored["mask"], bool),
        rules=tuple(_rule(entry, logits_LBTE.shape[-1]) for entry in stored["losses"]),
        updates=stored["updates"],
    )


def mixture(num_experts: int, **fields) -> model.ModelConfig:
    """A small model with this router; only its routing is used."""
    small = model.ModelConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return dataclasses.replace(small, num_experts=num_experts, **fields)


def _rule(entry: dict[str, Any], num_experts: int) -> Rule:
    coefficients = entry["coefficients"]
    return Rule(
        name=entry["name"],
        source=entry["source"],
        model=mixture(num_experts, **entry["model"]),
        balance=configs.Balance(**entry["balance"]),
        devices=entry["devices"],
        coefficients_L=None if coefficients is None else np.array(coefficients),
        loss=entry["loss"],
        gradient_LBTE=np.array(entry["gradient"]),
    )
