"""GGUF: one file with configuration, tokenizer and weights, as llama.cpp writes it and transformers reads it."""
