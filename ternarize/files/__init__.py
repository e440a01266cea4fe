"""Files and what is in them: a checkpoint's tensors a piece at a time, packed files, whole writes.

Nothing here knows a model or where files come from, and nothing holds a whole one. Imports trits/
and what all rooms share.

    names.py       what files of a checkpoint are called
    json_files.py  what can be read, and JSON: strictly ours, config.json without what would harm
    headers.py     headers of safetensors files, and bytes behind them
    entropy.py     tensors that are stored as entropy-coded streams
    checkpoint.py  the tensors of a checkpoint's files
    outputs.py     the place of a result, and bytes that reach the disk whole
    sums.py        SHA256SUMS
    metadata.py    what a packed file's header says of its tensors: records, and checks of them
    stored.py      tensors of packed files read and checked by the compiled core
    container.py   the stored bytes of a packed tensor
    recoded.py     packed files written again, with tensors as streams or without
    unmapped.py    packed files read into memory where transformers would map them
    sections.py    changes of tensors as bytes
    patch.py       the file of a patch
    llama_cpp.py   llama.cpp's names and numbers
    gguf.py        the format GGUF, read
"""
