"""A packed checkpoint brought elsewhere: to the Hub, to other engines, to those who have its base.

It is verified first and never changed. Imports every room before it.

    card.py          the model card
    journal_card.py  that of a journal of steps
    hub.py           all of it in one commit
    export/          files that other engines load
    vllm/            a plug-in of vLLM
    recode.py        the same tensors in fewer bits, or as they were before
    patches.py       what differs from another packed checkpoint, and that one again
"""
