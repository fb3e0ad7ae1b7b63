"""The command lines behind tools/: each module has a ``main`` that returns the exit code."""
