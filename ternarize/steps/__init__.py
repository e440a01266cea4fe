"""Journals of steps: a start, and the few trits that say how it was changed; see formats/steps.md.

Integers alone, so that a replay gives the same bytes everywhere.

    generator.py   random words with an address, perturbations made of them
    coding.py      which perturbations a step takes, in few bits
    start.py       tensors that begin from a seed, and the model that they are
    journal.py     the bytes of a journal: header, records
    appender.py    a journal that is written on
    replay.py      steps applied to trits and exponents, any range by itself
    base.py        what a journal begins from: a packed checkpoint, or its seed
    operations.py  edits, forks, merges, blocks; digests checked
    seeded.py      a start from the seed after steps, as files: a container, a whole model
    checkpoint.py  a journal replayed on what it begins from, as a checkpoint or rows
"""
