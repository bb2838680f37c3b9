"""The virtual try-on study, and the small world and model on which it runs without a GPU."""
