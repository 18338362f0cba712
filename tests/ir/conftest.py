"""Examples for the property tests of this folder."""

from __future__ import annotations

import os

from hypothesis import settings

# "suite" draws the same examples each time; CLSA_EXAMPLES=search looks further.
settings.register_profile("suite", derandomize=True, max_examples=120, deadline=None, database=None)
settings.register_profile("search", max_examples=3000, deadline=None)
settings.load_profile(os.environ.get("CLSA_EXAMPLES", "suite"))
