"""The runtime: sessions, chunked prefill and decode over them, and generation as transformers does it."""
