"""Calibration: what a source model does on samples decides its trits and scales.

Samples are made of texts, the model is run on them block by block, and every matrix is solved
against what was seen; windows of blocks can be trained on top. The room knows models and
plans, and nothing of the files that a conversion writes.

    texts.py        files and data sets of the Hub -> documents
    samples.py      documents -> three sets of samples, for each kind of model
    apart.py        documents of a text that a training keeps apart
    inputs.py       samples without documents: rows of tensors, what the model itself writes
    speech.py       recordings of a folder -> windows that a model hears, and their words
    data.py         from a recipe's data set to batches
    blocks.py       a model run block by block, with one block's weights in memory
    ranks.py        several processes: who has which samples, and which matrices
    dead_zone.py    a share of zeros: which trits are worth not to be one
    budget.py       group sizes, planes and zeros of matrices for given bits; how many got which
    tracing.py      which products a block makes, and the sums that they enter
    moments.py      what is summed up over the tokens of a matrix
    metric.py       the metric in which a matrix is approximated, and its factor
    sweep.py        columns rounded one by one, each making up for the errors before it
    gptq.py         one matrix solved: its target, trits, scales
    reconstruct.py  several matrices trained together by gradient
    lanes.py        the two streams of every batch: the source model, and the packed one
    solved.py       the files of blocks that are done
    collect.py      the moments of a group's matrices, from all processes at those that solve them
    solve_block.py  one block: its groups one after the other, each of their matrices solved
    training.py     a window of blocks, trained as each one is solved
    run.py          the loop over all blocks
    pipeline.py     what a conversion calls: data, then budget, then blocks, then figures
"""
