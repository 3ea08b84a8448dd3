"""Property tests are the same at every run, so that a red build means a changed program.

`HYPOTHESIS_PROFILE=explore pytest` draws new examples, more of them.
"""

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
