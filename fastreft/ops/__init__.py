"""The native ops, and the one place that chooses how an edit is computed (``edit.py``).

May know torch and the extension; knows no module, no model and nothing of Transformers or PEFT.
"""
