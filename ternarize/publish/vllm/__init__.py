"""A plug-in of vLLM: `vllm serve PACKED`, in whatever environment has both packages.

    matrices.py  what one process has of packed matrices, several as one, and their product
    layers.py    vLLM's methods of linear layers, of the token embedding and of the output head
    experts.py   that of a mixture of experts
    config.py    which layer gets which, and what a checkpoint is refused for

vLLM calls `register_with_vllm` in each of its processes (entry point `vllm.general_plugins`). Only
the last three import it, and only there: the rest of the package neither needs nor knows it.
"""


def register_with_vllm() -> None:
    """Make vLLM know the `quant_method` of packed checkpoints; a second call changes nothing."""
    from ternarize.publish.vllm import config  # noqa: F401
