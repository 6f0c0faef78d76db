"""Proofs for everybody: traces driven through transformers and through a session, and tolerances that mean something."""
