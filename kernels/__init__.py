"""Triton kernels. They import torch and triton only, and know neither SGLang nor the pools."""
