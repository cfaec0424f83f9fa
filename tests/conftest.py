"""Shared fixtures and the path that lets tests import the slow references beside them."""

import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

# importlib mode leaves `sys.path` alone, so the reference files would not be importable.
sys.path.insert(0, str(Path(__file__).parent))

# Matrices of 32 columns gain nothing from threads, and threads of several test runs starve each other.
torch.set_num_threads(1)

# Properties are searched the same way on every run, so that a red test stays red; `--hypothesis-profile=long` hunts.
# Found examples are printed by the failing test; a database of them would only lie about in the tree.
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
settings.register_profile("ci", derandomize=True, max_examples=60, **QUIET)
settings.register_profile("long", max_examples=5000, **QUIET)
settings.load_profile("ci")
