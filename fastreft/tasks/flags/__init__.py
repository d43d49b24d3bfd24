"""What each command can be told: a module a command with ``parse(argv)``, which gives what the command's ``run`` takes.

What can be wrong with flags and YAML is said here, in a second or two: imports neither torch nor PEFT nor datasets.
"""
