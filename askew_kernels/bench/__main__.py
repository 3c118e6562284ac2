"""The child process of ``runs.run_entries_warm``; what users call is ``python -m askew_kernels bench``."""

import sys

from .runs import child_main

sys.exit(child_main(sys.argv[1:]))
