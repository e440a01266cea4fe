"""Packed layers: modules that hold packed weights and compute as if the weights were dense.

    linear.py     linear layers, with the kernels and without
    convolution.py   two-dimensional convolutions, by the same products
    matrix.py     a packed parameter that a model's own code uses as if it were dense
    experts.py    experts that a model fuses into one parameter
    embedding.py  token embeddings

The first is an nn.Linear, because that is what other software (PEFT) looks for, and the second an
nn.Conv2d; the others are the model's own classes with ours mixed in.
"""
