"""Balance losses of other libraries on this machine against the same vectors.

A peer's own code runs: its router, on logits that an identity matrix makes, and its loss.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import types
from collections.abc import Callable, Iterator

import numpy as np

from moe_jax.conformance.vectors import Rule, Vectors

# Families of Transformers whose loss is Mixtral's, with their module and router class.
FAMILIES = {
    "mixtral": "MixtralTopKRouter",
    "olmoe": "OlmoeTopKRouter",
    "flex_olmo": "FlexOlmoTopKRouter",
    "minimax": "MiniMaxTopKRouter",
    "qwen2_moe": "Qwen2MoeTopKRouter",
    "qwen3_moe": "Qwen3MoeTopKRouter",
    "qwen3_next": "Qwen3NextTopKRouter",
    "qwen3_5_moe": "Qwen3_5MoeTopKRouter",
    "qwen3_vl_moe": "Qwen3VLMoeTextTopKRouter",
    "gpt_oss": "GptOssTopKRouter",
}


@dataclasses.dataclass(frozen=True)
class Found:
    """The largest relative errors of a peer's code for a rule, or why it has none."""

    code: str
    rule: str
    loss: float | None = None
    gradient: float | None = None
    missing: str = ""


def transformers(data: Vectors) -> Iterator[Found]:
    """Transformers' load-balancing and z-losses, family by family.

    `switch_transformers` has no mask: it gets the valid tokens of each layer as one group.
    """
    rules = {rule.name: rule for rule in data.rules}
    switch = "switch_transformers"
    yield _found(data, rules["switch"], switch, _switch)
    yield _found(data, rules["router_z"], switch, _router_z)
    for family, name in FAMILIES.items():
        of_family: Callable = _of_family(name)
        yield _found(data, rules["hugging_face"], family, of_family)


# By the name of the package.
PEERS: dict[str, Callable[[Vectors], Iterator[Found]]] = {"transformers": transformers}


def version(peer: str) -> str:
    """The version of a peer.

    Raises: ValueError if it is not installed here.
    """
    for package in (peer, "torch"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--peer={peer} needs the package {package}, which is not installed here: "
                f"pip install {package}"
            )
    return f"{peer} {importlib.metadata.version(peer)}"


def _found(data: Vectors, rule: Rule, family: str, loss: Callable) -> Found:
    import torch

    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError as error:
        return Found(family, rule.name, missing=str(error))
    logits_LBTE = torch.tensor(data.logits_LBTE, dtype=torch.float32, requires_grad=True)
    try:
        value = loss(module, rule, logits_LBTE, torch.tensor(data.mask_BT))
        value.backward()
    except (AttributeError, TypeError, ImportError) as error:  # another interface in this release
        return Found(family, rule.name, missing=f"{type(error).__name__}: {error}")
    gradient_LBTE = np.zeros(data.logits_LBTE.shape)
    if logits_LBTE.grad is not None:
        gradient_LBTE = logits_LBTE.grad.numpy()
    off = np.abs(gradient_LBTE - rule.gradient_LBTE).max() / np.abs(rule.gradient_LBTE).max()
    return Found(family, rule.name, abs(value.item() / rule.loss - 1), float(off))


def _of_family(router_class: str) -> Callable:
    def loss(module, rule: Rule, logits_LBTE, mask_BT):
        import torch

        E, k = rule.model.num_experts, rule.model.num_experts_per_tok
        names = types.SimpleNamespace(
            hidden_size=E,
            num_experts=E,
            num_local_experts=E,
            num_experts_per_tok=k,
            norm_topk_prob=True,
        )
        router = getattr(module, router_class)(names)
        with torch.no_grad():
            for name, parameter in router.named_parameters():
                parameter.copy_(torch.eye(E) if name == "weight" else torch.zeros(E))
        # A model hands the first output of each router to its loss.
        outputs = tuple(router(logits_BTE.reshape(-1, E))[0] for logits_BTE in logits_LBTE)
        of_all = module.load_balancing_loss_func(outputs, E, k, mask_BT.long())
        return rule.balance.load_balancing_coefficient * of_all

    return loss


def _switch(module, rule: Rule, logits_LBTE, mask_BT):
    probabilities_LME = logits_LBTE[:, mask_BT].softmax(dim=-1)
    losses = [
        module.load_balancing_loss_func(p_ME[None], p_ME.argmax(dim=-1)[None])
        for p_ME in probabilities_LME
    ]
    return rule.balance.load_balancing_coefficient * sum(losses)


def _router_z(module, rule: Rule, logits_LBTE, mask_BT):
    losses = [module.router_z_loss_func(z_ME[None]) for z_ME in logits_LBTE[:, mask_BT]]
    return rule.balance.router_z_coefficient * sum(losses)
