"""The record: what was run, what came out, and the pages that show it."""
