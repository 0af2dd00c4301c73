"""Puts the project's modules and the tests' helpers on the path, wherever pytest is started."""

import os
import pathlib
import sys

# The models here are tiny: a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = pathlib.Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402

torch.set_num_threads(1)
