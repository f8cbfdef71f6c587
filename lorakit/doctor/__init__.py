"""What ``lorakit doctor`` reports: whether this machine can train, and what would slow it down.

A module per area yields ``Finding``s; ``diagnose`` collects them. A finding with a problem has a
hint that fixes it. Other commands import nothing from here, and torch is imported only when the
checks run, so that a broken installation is reported and not raised.
"""
