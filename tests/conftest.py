"""Settings that must stand before anything is imported."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it while it is imported: its kernels then run in an interpreter on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
