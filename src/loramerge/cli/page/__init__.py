"""The page of ``loramerge ui``: what it reads, what is chosen on it, what it shows, and its layout.

Only `layout` imports gradio.  The page computes nothing itself: a choice is a recipe, which the library plans and writes.
"""
