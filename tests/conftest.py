"""Run `python -m pytest` from the repository root.

`--hypothesis-profile=deep` tries more examples.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.register_assert_rewrite("tiny")
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start

slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "default", deadline=None, max_examples=50, suppress_health_check=slow_is_fine
)
settings.register_profile(
    "deep", deadline=None, max_examples=2000, suppress_health_check=slow_is_fine
)
settings.load_profile("default")
