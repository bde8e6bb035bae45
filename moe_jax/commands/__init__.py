"""One file per command: it parses arguments, makes one call and prints the result.

Here, and only here, a `main()` may import modules after it has read its arguments and config: the
imports that a run needs take seconds, and a mistake should be reported at once.
"""
