"""One file per command: arguments in, one call, words out."""
