"""German to English, character by character: `python -m examples.translation --help`."""
