"""Adapters and models on the Hugging Face Hub.

``check.py`` finds out before training whether a push can succeed; ``files.py`` chooses what is
uploaded; ``push.py`` uploads it as one commit; ``client.py`` words the errors.
"""
