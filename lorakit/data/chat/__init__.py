"""Chats through the tokenizer's chat template.

The rule: what is trained of a turn is exactly what follows, to the byte, the prompt that generation
gives the model at that point.
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
