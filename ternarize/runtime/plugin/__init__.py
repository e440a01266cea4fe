"""The plug-in that lets transformers load and save packed checkpoints.

transformers builds the model without memory (on meta), asks the quantizer to prepare it, and fills
it from the checkpoint, renaming and fusing tensors on the way. So, before the fill:

    read the header of each file -> verify the bytes -> find the place of each packed tensor in the
    model -> put an empty ternary module there -> check that nothing will be missing

Which modules are ternary is what the files say, not a list in the config: a list can disagree with
the tensors, and transformers would then draw the weights at random with no more than a warning.

Fused tensors (experts that are stored one by one; query, key and value in one matrix) need nothing
special: packing goes along the rows, so whatever transformers does to rows it can do to packed rows
and to their scales. Tied tensors (an output head that is the token embedding) are one packed
parameter in several modules, tied by transformers as dense ones are, and so are their scales.

    prepare.py    before the fill: empty ternary modules, and checks that tensors fit them
    int8_head.py  an output head that is rounded to 8 bits once it is there
    finish.py     after the fill: biases that the source lacked, checks; or all made dense again
    saving.py     what save_pretrained says of the files that it writes
    quantizer.py  what transformers calls: its config and its quantizer, and their registration

quantizer.py is imported in the middle of an import of transformers. So it imports the others, which
want all of transformers, where it calls them.
"""
