"""Importing this puts the checkout first on the path, so that a benchmark runs where nothing of it is installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
