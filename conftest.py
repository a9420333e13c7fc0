"""Settings that every test runs under; at the root, so that `pytest plugins/inject/lora` alone has them too."""

from __future__ import annotations

import os

import hypothesis

# Read when torch, transformers and tokenizers are imported, which the tests do later than this file.
os.environ["OMP_NUM_THREADS"] = "1"  # one process a core; and sums come out the same on every machine
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# No deadline: the first example pays for imports. In CI the examples are the same in every run.
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")
