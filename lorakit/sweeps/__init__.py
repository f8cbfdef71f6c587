"""Many runs from one recipe: ``lorakit sweep``.

``sections`` are the keys of a sweep file, ``load`` checks it and makes its ``members``, ``run``
trains them, in the processes of a launcher with ``shared``, and keeps ``results``, which ``table``
and ``plots`` show. To add a key, add it to
``sections``; what it means for a member belongs to ``members``.
"""
