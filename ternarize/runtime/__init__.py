"""Packed weights that run: from bytes in a file to a model that writes text.

A packed parameter keeps its bytes in memory, as they lie in the file or in the order in which a
processor multiplies them; a dense weight is made for the length of one product, if at all. The room
may import transformers, and all rooms above it but for those where sources come from.

    kernels.py    the compiled core's products, memory and threads; products' definition in torch
    triton_kernels.py   the kernels for GPUs, where Triton is installed
    tiles.py      ternary weights on a GPU: their layout, and the product from it
    forms.py      in which form a packed parameter is held: its layout, columns, lanes; and dense
    products.py   y = x W^T by what serves the weight, the input and the device
    packed.py     what packed modules have in common
    unfold.py     the patches of images that a convolution multiplies
    modules/      linear layers, convolutions, fused experts, token embeddings
    straight.py   packed matrices on their way from a file into linear layers
    adapters.py   PEFT's adapters beside packed layers
    plugin/       what transformers calls to load and to save
    load.py       `ternarize.load`, and the import hook that registers the plug-in
    load_module.py   `ternarize.load_module`: into a module that is none of transformers'
    decode.py     one token after the other in the compiled core, past transformers' modules
    generate.py   a text continued
    chat.py       a conversation: what was said, and still fits
    rehearsal.py  whether what a conversion is about to write will load
"""
