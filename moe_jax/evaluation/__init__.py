"""Evaluators of a trained model: held-out loss, continuations, similarity of experts."""
