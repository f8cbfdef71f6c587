"""Encode chats with the tokenizer's chat template.

The trained part of a turn is exactly the text that follows the prompt that the model receives there
in generation. To work with any template of the Hub, no code here is specific to a template: its
behavior is observed by rendering chats, unchanged or slightly modified.

There is nothing to register for a new template. To support a new key of messages, add it to
``template``; to report something else that a template changes, count it in ``encode``.
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
