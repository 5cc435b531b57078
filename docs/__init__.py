"""Pages to read and to play with."""
