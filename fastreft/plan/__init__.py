"""Which rows a forward edits: positions, from what the model was given, and the hooks through which blocks come to know.

May know torch and the calling conventions of Transformers' models and generation; knows no intervention and nothing of PEFT.
"""
