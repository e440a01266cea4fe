"""What a trit is and how it is stored: tensors in, tensors out, no files.

Imports torch and what all rooms share; no other room.

    ternary.py   a ternary matrix: trits, scales, groups
    scales.py    scales as they are stored
    base3.py     five trits in a byte
    int8.py      a byte a weight
    int4.py      half a byte a weight
    rans.py      packed rows in as many bits as their frequencies allow
    rotation.py  inputs rotated by signs and a Hadamard matrix
    ggml.py      blocks of llama.cpp
    methods/     ternarization without data
    planes.py    a weight as the sum of ternary matrices
"""
