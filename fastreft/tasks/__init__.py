"""What the command line does, one module a command: its flags in :mod:`fastreft.tasks.flags`, its ``run`` here.

Each can be called from Python too.
"""
