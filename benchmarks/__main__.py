"""`python -m benchmarks`; the work is in `measure`, where the processes that measure memory can find it by its name."""

import sys

from benchmarks.measure import main

sys.exit(main(sys.argv[1:]))
