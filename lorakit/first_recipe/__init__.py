"""Write a first recipe from a look at the data and the model, for ``lorakit init``.

``columns`` describes the columns of the rows, ``choose`` finds a task for them, ``model`` knows the
base model, ``settings`` sets the numbers of the run, ``sections`` chooses the keys, ``text`` writes
YAML with comments, and ``draft`` puts them together. To let ``init`` recognize the rows of another
task, add a function to ``choose``.
"""
