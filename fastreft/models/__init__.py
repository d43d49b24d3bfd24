"""Where a model keeps its blocks (``blocks.py``) and how their hidden states lie in memory (``layouts.py``).

May know torch and the conventions of Transformers' models; knows nothing of edits, plans or PEFT.
"""
