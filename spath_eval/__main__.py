"""`python -m spath_eval` is `spath-eval`."""

import sys

from spath_eval.cli import main

sys.exit(main())
