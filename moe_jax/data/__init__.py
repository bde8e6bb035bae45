"""Text to batches: sources, tokenizers, the row plan, the pipeline."""
