"""Tool calls in generated text: one file for each kind of format, `select.py` to choose."""
