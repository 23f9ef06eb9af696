"""The campaign against failure lives in benchmarks/; a small part of it is run here."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
