"""How work that takes long tells how far it is."""

from collections.abc import Callable

# called with (how much is done, of how much in all, what is done just now, the stage of the work);
# stages, such as "calibrating" and "packing", count each in its own unit
Progress = Callable[[int, int, str, str], None]
