"""The kill suite: real code with one planted fault each, and which properties tell.

    python -m tests.kill                  every fault, until the property that is named for it tells
    python -m tests.kill --all            every fault against every property: the whole table (hours)
    python -m tests.kill --only NAME ...  some faults

A fault is an edit of a copy of the source: a function by its name, and a piece of its syntax tree, so that code may
move and be laid out anew. An edit whose place is gone fails the run, so that the list cannot rot. Each copy is tested
in a process of its own.
"""
