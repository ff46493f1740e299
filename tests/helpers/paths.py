"""Where the repository is, and what processes that tests start must find."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
# A PYTHONPATH under which emulation, cases, fuzz and the helpers can be imported.
PYTHONPATH = os.pathsep.join([str(TESTS), str(TESTS / "helpers")])
