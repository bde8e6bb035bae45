"""Evaluation of models: held-out loss, continuations, multiple choice, answers, comparisons."""
