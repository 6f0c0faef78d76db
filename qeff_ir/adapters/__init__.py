"""Low-rank adapters (LoRA): which layers they change, how PEFT stores them, and how a running session takes them."""
