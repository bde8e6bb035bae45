"""Evaluators of a trained model: loss on held-out text, continuations, experts."""
