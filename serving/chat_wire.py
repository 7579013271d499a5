"""Conversations on the wire: between `jaxinfer.v1.Chat` and `jaxinfer.conversation.Conversation`.

Hides the JSON texts inside the message, and the names of its fields in errors.
"""

from __future__ import annotations

import json
from typing import Any

from jaxinfer.conversation import Conversation
from jaxinfer.request import RequestError
from serving.protos.jaxinfer.v1 import inference_pb2 as pb


def conversation_from_proto(message: pb.Chat) -> Conversation:
    """The conversation, not yet checked but for its JSON. RequestError names the field that cannot be parsed."""
    return Conversation(
        messages=_parsed(message.messages_json, "messages_json"),
        tools=_parsed(message.tools_json, "tools_json") if message.HasField("tools_json") else None,
        add_generation_prompt=message.add_generation_prompt if message.HasField("add_generation_prompt") else None,
        continue_final_message=message.continue_final_message,
        template_name=message.template_name if message.HasField("template_name") else None,
        variables=_parsed(message.variables_json, "variables_json") if message.HasField("variables_json") else {},
    )


def conversation_to_proto(conversation: Conversation) -> pb.Chat:
    """The message; RequestError for what is not JSON data or not valid Unicode."""
    continued = conversation.continue_final_message
    fields: dict[str, Any] = {
        "messages_json": _json(conversation.messages, "messages"),
        "tools_json": None if conversation.tools is None else _json(conversation.tools, "tools"),
        "add_generation_prompt": conversation.add_generation_prompt,
        "continue_final_message": ("content" if continued is True else continued) or None,
        "template_name": conversation.template_name,
        "variables_json": _json(conversation.variables, "variables") if conversation.variables else None,
    }
    try:
        return pb.Chat(**fields)
    except UnicodeEncodeError as error:
        raise RequestError("template_name", f"is not valid Unicode: {error}") from None
    except TypeError as error:
        raise RequestError("chat", str(error)) from None


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"chat.{name}", f"is not JSON: {error}") from None


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value)  # ASCII: a lone surrogate is escaped, and the server names its place
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(name, f"is not plain JSON data: {error}") from None
