"""`python -m osscompile_runtime.measure DIR`: measure candidates where the runtime alone is."""

import sys

from .trials.measure import main

if __name__ == "__main__":
    sys.exit(main())
