"""What holds for every test. No test is timed: how long an example takes says nothing of what it
shows. And where there is no GPU, kernels are interpreted, which Triton must know when it is
imported (transformers does); nothing else here uses it."""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
