"""Where weights come from: directories, the Hub, packed checkpoints, ternary models of others.

Whatever a source is, what comes out is a `Checkpoint` of files/, read a piece at a time. Imports
trits/, files/ and models/ and what all rooms share.

    hub_errors.py  what the client of the Hub raises, as an error of ours
    fetch.py       models of the Hub, fetched into the cache and checked
    checkpoint.py  which files of a directory hold the weights
    stream.py      a source on the Hub that does not fit the disk
    packed.py      packed checkpoints and their record
    origin.py      where a checkpoint came from
    imports/       ternary models of others
    folded.py      a checkpoint with a rotation in its weights
"""
