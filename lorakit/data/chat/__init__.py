"""Encode chats with the tokenizer's chat template.

The rule: the trained part of a turn is, to the byte, what follows the prompt that generation gives
the model at that point. Every template of the Hub is meant to work unchanged, so nothing here knows
a template by name: its behavior is observed by rendering chats, with small changes where needed.
"""

from lorakit.data.chat.encode import (
    ChatEncoder,
    EncodedChat,
    around_answer,
    chat_prompt_text,
    encode_chat,
    encode_chat_prompt,
)

__all__ = [
    "ChatEncoder",
    "EncodedChat",
    "around_answer",
    "chat_prompt_text",
    "encode_chat",
    "encode_chat_prompt",
]
