"""Trials that try to break the server and its store, and say whether what must hold held.

    make chaos                          # all of them, at full size: some hours
    make chaos CHAOS="kill tenants"     # some
    make chaos CHAOS="--short"          # all of them, in a minute or two

Everything happens on this machine, on the loopback and in temporary folders. `test_chaos.py` runs the short forms.
"""
