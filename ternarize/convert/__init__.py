"""A checkpoint into a packed one, by its plan, and the proof that it is one.

What reads weights and writes them in the order of a plan, and what compares the two afterwards. It
may import from all rooms but `publish` and `cli`.

    tensor.py     one tensor: read a piece, fit it, write it; what it turned out to need
    workplace.py  OUTPUT.partial: who may work there, whose it is, whether it has ended
    journal.py    which tensors are done, and how a second run takes them up
    entropy.py    files coded by the frequencies of their trits
    limits.py     memory, threads and room on the disk
    record.py     what is written beside the weights: ternarize.json, config.json, index
    parts.py      several processes at one conversion, and all put together
    forecast.py   what each of several processes would do, and how long
    fitting.py    what data decide of it: calibration and training
    run.py        plan -> calibrate -> train -> shards -> record -> verify -> rename
    scratch.py    a model drawn at random, then trained and packed
    trained.py    a model that was trained with `ternarize.qat`, packed as it is
    module.py     a module of torch's that is none of transformers', packed
    verify.py     proof that a packed checkpoint is whole, and what its source gives
    check.py      how far a result made without data is from its source, measured at once
"""
