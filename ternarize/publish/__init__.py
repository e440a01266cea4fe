"""A packed checkpoint brought elsewhere: to the Hub, to other engines.

It is verified first and never changed. Imports every room before it.

    card.py  the model card
    hub.py   all of it in one commit
    export/  files that other engines load
"""
