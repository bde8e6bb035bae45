"""From text to batches: sources, tokenizers, token records, the row plan, arrays on devices."""
