"""The long run: `python -m tests.threads [--count 500]`, so many generations in every scenario on every target."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    os.environ["QEFF_THREADS_COUNT"] = str(parser.parse_args().count)  # read by `tests.threads.crowd`
    raise SystemExit(pytest.main(["-v", str(Path(__file__).parent)]))
