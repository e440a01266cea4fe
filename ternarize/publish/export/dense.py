"""Export to an ordinary checkpoint: the weights in floating point, which loads everywhere."""

from ternarize.publish.export.common import Losses, PackedCheckpoint
from ternarize.publish.export.directory import (
    Contents,
    dense_item,
    refuse_activations,
    target_dtype,
)


def dense_contents(
    packed: PackedCheckpoint, losses: Losses, *, dtype: str | None = None
) -> Contents:
    """An ordinary checkpoint in floating point.

    dtype  "float32", "float16" or "bfloat16", of all floating-point tensors; None: packed tensors
           in the model's own dtype (in which they run), kept ones as they are

    Weights are rounded once, from float32. Raises CheckpointError where activations in int8 are on
    record, which such a checkpoint cannot say, WeightError where `dtype` cannot hold a weight.
    """
    refuse_activations(packed, losses)
    losses.stop_unless_allowed(packed, "Convert the source with --activations none.")
    target = target_dtype(packed, dtype)
    items = [
        dense_item(packed, name, target if record.shape or dtype else None, losses)
        for name, record in packed.records.items()
    ]
    return items, {"dtype": str(target)[6:]}
