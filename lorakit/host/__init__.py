"""This machine: the cores and the memory that the process may use, and how idle threads wait.

``resources`` knows the limits of a container; ``openmp`` measures what other processes use. Neither
needs a tensor library to be imported.
"""
