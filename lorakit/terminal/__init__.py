"""What is shown on a terminal, for the commands and for runs: tables and progress bars.

``columns`` and ``progress_lines`` import no library, so that any package may use them.
"""
