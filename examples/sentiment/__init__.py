"""Reviews, good or bad: `python -m examples.sentiment --help`."""
