"""The command line: one file a command, found by name.

A command is a module with a dataclass ``Options`` and a function ``run(arguments)``; the first line of its docstring is
its help.
"""
