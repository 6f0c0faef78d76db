"""The frontend: an unmodified transformers model becomes a `Module`, without loading a weight.

The way: ``source`` (a folder, a hub id, a model in memory; what it is for is a ``tasks.Task``) -> ``checkpoint`` (its
files as references, the model without weights) -> ``layers`` (one layer of each kind) -> ``capture`` (attention, caches
and recurrences as one op each) -> ``export`` (the trace, converted) -> ``layers`` (the layers that were left out).
``private`` is the only place that touches what transformers does not publish.
"""
