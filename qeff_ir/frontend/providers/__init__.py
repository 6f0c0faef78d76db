"""Where a model comes from, whatever it is for: a folder, a GGUF file, or memory."""
