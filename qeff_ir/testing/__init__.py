"""Proofs for everybody: traces driven through transformers and a session, and tolerances that mean something."""
