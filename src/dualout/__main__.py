"""``python -m dualout``, and so ``torchrun … -m dualout``: the command line."""

import sys

from dualout.cli.main import main

sys.exit(main())
