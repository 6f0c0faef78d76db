"""Tracing a model, and the way from the trace to a `Module`: positions, counts, limits, what torch cannot write."""
