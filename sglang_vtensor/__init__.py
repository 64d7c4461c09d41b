"""KV memory for SGLang on virtual tensors (vTensor, arXiv 2407.15309).

The core (`vmm`, `layout`, `placement`, `backing`, `memory`, `kernels`) knows nothing of SGLang; `srt` is what SGLang
sees of it, and `patches` says where each SGLang version takes it.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `kernels` and `patches` lie beside this package, and are found there without an editable install.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
