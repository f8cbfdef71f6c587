"""Reading and writing files, independent of what they contain.

Every file or directory that must never be seen half-written is written through ``atomic``.
"""
