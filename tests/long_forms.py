"""The mark of tests that take long: `AFFSCL_LONG=1 pytest` runs them, too."""

import os

import pytest

ASKED = bool(os.environ.get("AFFSCL_LONG"))
LONG = pytest.mark.skipif(not ASKED, reason="a long form: AFFSCL_LONG=1")
