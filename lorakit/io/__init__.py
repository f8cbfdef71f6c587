"""Reading and writing files, independent of what they contain.

Files and directories that readers must never see half-written are written through ``atomic``.
"""
