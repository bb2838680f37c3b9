"""Merges that are learned: the model is given as a function, the result is an ordinary LoRA."""
