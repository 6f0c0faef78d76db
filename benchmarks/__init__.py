"""The benchmark harness: figures of ours beside those of peers, measured in the same run on the same threads."""
