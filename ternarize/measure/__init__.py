"""Measuring: how much of a model is left, how fast it runs, and what a packed checkpoint holds.

Nothing here changes a model or writes a checkpoint. Models are loaded as users load them.

    figures.py          means with standard errors, and bounds that they may be held to
    documents.py        a text file as documents and windows of tokens; the package's own text
    language_models.py  next words against the source's: perplexity, divergence, agreement
    encoders.py         lines of a text -> tokens -> embeddings, and how near the source's they are
    prompts.py          what a model is to write after, from a text or a file
    writing.py          what it writes: loops, repetitions, ends and right answers
    measured.py         a checkpoint that is to be measured, packed or not, and its model
    audio.py            a folder of speech: recordings, transcripts, and what a model hears
    speech.py           what a recogniser writes of what it hears: word error rates
    evaluate.py         a packed model against its source, on texts and in what it writes
    tasks.py            tasks of the lm-evaluation-harness
    bench.py            tokens per second, and bytes of weights against the speed of memory
    report.py           a packed checkpoint tensor by tensor, in figures and drawn
    step_log.py         the steps of a journal, in figures and drawn
"""
