"""``python -m qeff_ir.cli``."""

from __future__ import annotations

import sys

from qeff_ir.cli.app import main

sys.exit(main())
