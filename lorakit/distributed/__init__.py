"""The process group that a launcher starts, and what its processes share and exchange."""
