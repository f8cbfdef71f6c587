"""The recipe: its keys, how it is read, checked and written, and how its errors are worded.

A section is a pydantic model in ``sections``. Methods and tasks extend ``AdapterSection`` and
``TaskSection`` with their own keys in their own files; a new key of ``model`` or ``train`` is a
field there. A rule that involves several keys is a function in ``check``. Nothing here imports
torch: recipes are validated without it.
"""
