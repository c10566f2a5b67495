"""The scripts of `reward_models/` import each other by name, as when they are run."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[2] / "reward_models"))
