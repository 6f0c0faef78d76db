"""Real threads on real sessions: each answer is that of the model alone (`python -m tests.threads`: the long run)."""
