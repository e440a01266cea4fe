"""How work that takes long tells how far it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# called with (how much is done, of how much in all, what is done just now, the stage of the work);
# stages, such as "calibrating" and "packing", count each in its own unit
Progress = Callable[[int, int, str, str], None]


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars of transformers inside; outside they are as they were."""
    from transformers.utils import logging  # slow to import

    bars: Any = logging  # has no annotations
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
