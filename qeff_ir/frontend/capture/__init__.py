"""What is captured while a model is traced: attention, caches, recurrences, experts, each as one op."""
