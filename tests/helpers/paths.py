"""Where the repository is, and what processes that tests start must find."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
# A PYTHONPATH under which emulation, cases, fuzz and the helpers can be imported. What this process was given stays in
# it, such as a folder with another Triton.
PYTHONPATH = os.pathsep.join([str(TESTS), str(TESTS / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])])
