"""One file per command: arguments in, one call, words out.

Here, and only here, a `main()` may import after it has read its arguments and config: the imports
of a run take seconds, and a mistake should be answered at once.
"""
