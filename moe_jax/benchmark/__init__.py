"""What the parts cost, beside bounds and peers measured in the same run."""
