"""Settings of the whole process, for processes that do little but run workflows. Nothing here is done unasked."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 50_000


def tune_garbage_collector() -> None:
    """Make Python's garbage collector look less often, and never at what is loaded now.

    By default it walks through thousands of objects of running workflows, and through all loaded modules, again and
    again, and finds nothing: Romancy's own objects form no cycles. Call this once, after the imports and before
    ``App.start``. It holds for the whole process, which is why only ``romancy worker`` does it by itself.

    Example:
        >>> tune_garbage_collector()
        >>> gc.get_threshold()[0]
        50000
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
