"""How much the longest tests try. `make EXAMPLES=100 test-long` tries everything; by default each tries enough to fail
when something is wrong often, and hypothesis draws anew each time, so that many runs see what one does not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
from typing import Any

#: Of a hundred.
SHARE = int(os.environ.get("VTENSOR_TEST_EXAMPLES", "30"))


def share_of(count: int) -> int:
    """Of so many random examples, how many are tried."""
    return max(4, count * SHARE // 100)


def pairs_of(ones: Sequence[Any], others: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Each with each of two equally long lists; by default each with one."""
    return list(product(ones, others)) if SHARE >= 100 or not ones else list(zip(ones, others, strict=True))
