"""The checkpoint: its files as references, the model without weights, and which tensor each parameter is."""
