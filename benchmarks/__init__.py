"""Speed, memory and exactness: `python -m benchmarks --help`."""
