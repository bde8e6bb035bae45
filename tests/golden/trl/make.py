"""Makes preferences.json: the losses of TRL's own trainers, and their gradients, on given logits.

    pip install trl==1.16.0 torch && python tests/golden/trl/make.py

A stub stands for the model: its logits are the parameters. The logits of the reference are others.
"""

import collections
import json
import pathlib
import types

import torch
import trl
from trl.trainer import dpo_trainer, kto_trainer

V, T, BETA = 7, 6, 0.3
# The tokens of a prompt, and of the chosen and the rejected answer.
PAIRS = [([1, 2], [3, 4, 5], [6]), ([2], [0, 1], [5, 4, 3, 2]), ([6, 5, 4], [1], [2, 3, 0])]
LOSSES = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "ipo": "ipo", "kto": "kto"}


def logits(shift: float) -> torch.Tensor:
    """[2P, T, V]: those of the chosen answers, then those of the rejected ones."""
    i = torch.arange(2 * len(PAIRS) * T * V, dtype=torch.float64)
    return (2 * torch.sin(1.7 * i + shift)).float().reshape(2 * len(PAIRS), T, V)


class Model:
    training = False

    def __init__(self, logits_BTV):
        self.logits_BTV = logits_BTV

    def __call__(self, input_ids, labels, **_):
        targets = labels[:, 1:]
        logits_BTV = self.logits_BTV[:, : targets.shape[1]]
        log_p = torch.log_softmax(logits_BTV, -1)
        found = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        zeros = torch.zeros_like(found)
        return types.SimpleNamespace(
            log_probs=torch.where(targets >= 0, found, 0),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def loss_of(name: str) -> tuple[float, list, dict]:
    model, frozen = Model(logits(0.0).requires_grad_()), Model(logits(0.4))
    answers = [(p, c) for p, c, _ in PAIRS] + [(p, r) for p, _, r in PAIRS]
    ids = torch.zeros(len(answers), T + 1, dtype=torch.long)
    completion_mask, attention_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(answers):
        whole = torch.tensor(prompt + answer)
        ids[row, : len(whole)] = whole
        attention_mask[row, : len(whole)] = 1
        completion_mask[row, len(prompt) : len(whole)] = 1
    accelerator = types.SimpleNamespace(
        device="cpu",
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        unwrap_model=lambda m: m,
    )
    module = kto_trainer if name == "kto" else dpo_trainer
    module.disable_gradient_checkpointing = lambda *_: torch.no_grad()
    module.is_peft_model = lambda model: False
    metrics = {"train": collections.defaultdict(list), "eval": collections.defaultdict(list)}
    trainer = types.SimpleNamespace(
        model=model,
        ref_model=frozen,
        accelerator=accelerator,
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[LOSSES[name]],
        loss_weights=[1.0],
        loss_type=LOSSES[name],
        beta=BETA,
        use_weighting=False,
        calculate_KL=True,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
    }
    if name == "kto":  # its baseline is then of the batch's own answers
        inputs |= {f"KL_{key}": value for key, value in inputs.items()}
        inputs["label"] = torch.tensor([True] * len(PAIRS) + [False] * len(PAIRS))
        trainer._compute_kl_logps = lambda model, batch: kto_trainer.KTOTrainer._compute_kl_logps(
            trainer, model, batch
        )
        loss = kto_trainer.KTOTrainer._compute_loss(trainer, model, inputs, False)
    else:
        loss = dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    named = {k: v[0] for k, v in metrics["eval"].items() if k.startswith(("rewards", "logps"))}
    return float(loss.detach()), model.logits_BTV.grad.flatten().tolist(), named


def main() -> None:
    found = {}
    for name in LOSSES:
        loss, gradient, named = loss_of(name)
        found[name] = {"loss": loss, "gradient": gradient, "metrics": named}
    made = {"trl": trl.__version__, "torch": torch.__version__, "beta": BETA, "pairs": PAIRS}
    path = pathlib.Path(__file__).with_name("preferences.json")
    path.write_text(json.dumps({**made, "losses": found}) + "\n")


if __name__ == "__main__":
    main()
