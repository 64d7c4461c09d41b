"""Kernels against a float32 reference: interpreted where there is no GPU, compiled where there is one.

Triton settles which of the two it is when it is imported, so these tests run in a process of their own.
"""

import os
import sys

import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton was imported before its interpreter was asked for: run pytest tests/kernels alone")
    os.environ["TRITON_INTERPRET"] = "1"
