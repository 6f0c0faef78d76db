"""Layers that do the same: which are copies of each other, and the whole model made from one of each kind."""
