"""KV memory for SGLang on virtual tensors (vTensor, arXiv 2407.15309).

The core (`vmm`, `layout`, `pages`, `segments`, `manager`, `kernels`) knows nothing of SGLang; `srt` is what SGLang
sees of it, and `patches` says where each SGLang version takes it.
"""

__version__ = "0.1.0"
