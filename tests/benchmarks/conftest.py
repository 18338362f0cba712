"""Scripts import their neighbours by name, as they do when they are run.

At the end of the path: a file there is called kernels.py, which transformers must not find first.
"""

import sys
from pathlib import Path

sys.path += [
    str(Path(__file__).parents[2] / folder) for folder in ("examples", "benchmarks", "tests/benchmarks")
]
