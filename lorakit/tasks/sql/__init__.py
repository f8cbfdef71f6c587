"""WikiSQL's queries: what they are, how they are written and read as SQL, and how they execute."""
