"""The fuzz suite: input that somebody else wrote, damaged with knowledge of its structure.

    python -m tests.fuzz --inputs 100000     spread over all families
    python -m tests.fuzz --minutes 10        as many as fit
    python -m tests.fuzz --only package onnx --inputs 1000
    python -m tests.fuzz --replay onnx:7     one slice again, by its family and seed
    pytest tests/fuzz                        2,000 inputs, and whether each kind of fault is told

An input is *refused* (a `QeffError`, or exit code 2) or *accepted*, and then what follows must hold: the tensors are
those that the format's own library reads, the package answers as before, the ONNX file opens in onnx. Everything else
is a fault: another exception, a process that dies or does not end, a file opened for writing outside of the input's
folder, code of the input that runs.

hypothesis draws the damage, so that a failing input shrinks and a slice is the same each time that its seed is given.
Each slice runs in a process of its own (`tests.fuzz.slices`); the record of what ran is ``record.md``.
"""
