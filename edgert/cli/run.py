"""`edgert run`: `edgert chat` that answers one prompt, from stdin when none is given."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgert.cli import chat

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.options import ChatOptions


def run(options: ChatOptions, context: Context) -> int:
    """Answer once and return the exit code."""
    prompt = options.prompt
    if prompt.prompt is None and prompt.file is None:
        options = replace(options, prompt=replace(prompt, prompt="-"))
    return chat.run(options, context)
