"""The nightly run: every property for thousands of random examples, in slices, with a record of what ran.

    python -m tests.nightly                     go on until every property has had its 5,000 examples
    python -m tests.nightly --minutes 60        stop then; the next call goes on where this one stopped
    python -m tests.nightly --only NAME ...     some properties
    python -m tests.nightly --anew              forget the record

Each slice is a process of its own, with a random seed, so that memory stays bounded and any of them can be run again:
``HYPOTHESIS_PROFILE=nightly QEFF_EXAMPLES=500 pytest --hypothesis-seed=SEED tests/properties/FILE::NAME``. The record,
``record.json`` and the table ``record.md``, counts examples that were run, as hypothesis reports them, not what a
profile asks for. A failure leaves its report and its bundle in ``.nightly``.
"""
