"""What transformers says of a model, without a weight of it.

Its classes are asked, on the meta device, and never a table of architectures. The room imports
no other but `files`.

    configuration.py  config.json as transformers reads it
    reads.py          what a model reads: its kind, lengths, first token, vocabulary
    places.py         where the tensors of a checkpoint go in a model, and which are tied
    source_code.py    what the code of a class does with a weight
    skeleton.py       a model on the meta device, and what is asked about it
"""
