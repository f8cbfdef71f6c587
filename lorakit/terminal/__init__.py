"""What is shown on a terminal, for the commands and for runs: tables and progress bars.

``columns`` imports no library, so that any package may use it.
"""
