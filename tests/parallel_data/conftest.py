"""Textbook optimizers and measures of narrow runs are those of other areas."""

import sys
from pathlib import Path

for area in ("optimizers", "precision"):
    path = str(Path(__file__).parents[1] / area)
    if path not in sys.path:
        sys.path.append(path)
