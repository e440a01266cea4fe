"""Training of a whole model: what a rule or calibration has left learns from its source, or a text.

Texts stream by and become samples; the student is the model with latent weights (`ternarize.qat`),
its teacher the source or another model. Its best state on held-out documents is what a conversion
stores. The room knows models, plans and the files of calibration, and nothing of the files that a
conversion writes.

    losses.py      losses over large vocabularies, in pieces, with their gradients
    texts.py       documents of any number -> samples without end, and those that are kept apart
    sources.py     the samples of a training, for each kind of model and text
    attention.py   attention of narrow heads in float32, where that is faster
    students.py    the two models, and how their outputs are compared
    parallel.py    what several processes that train one model tell each other
    divided.py     blocks divided among processes
    recompute.py   blocks that run again in the backward pass, for less memory
    compiled.py    blocks compiled by torch, for shorter steps
    state.py       how far a training is, on the disk
    loop.py        samples, loss, step; looks at held-out text; what a broken run goes on from
    objectives.py  the loss of samples, by kind of model and objective
    optimizer.py   the optimizer
    run.py         the stage of a conversion: from its plan to what is to be stored, and figures
    logs.py        the trackers of accelerate
    moved.py       the values of a journal of steps in a module, and gradients by them
    probes.py      how the loss changes along perturbations, with and without backward
    drawn.py       models drawn at random from a configuration; journals that are a whole model
    session.py     what is trained by steps: data, the model, its losses
    votes.py       steps of a journal, found by probing and trying
    pursuit.py     scales or trits trained by gradients, and steps that go there
    journals.py    a packed model, or one from its seed, trained by a journal of steps
"""
