"""`python -m arcmerge`."""

import sys

from arcmerge.cli import main

sys.exit(main())
