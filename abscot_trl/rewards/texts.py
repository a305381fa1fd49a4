"""Prompts and completions as text: trl hands over strings, or lists of messages where the data is conversational."""

Messages = str | list[dict[str, str]]


def completion_text(completion: Messages) -> str:
    """The answer y. Special tokens, the trace's among them, are gone: trl leaves them out in decoding."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion)


def prompt_text(prompt: Messages) -> str:
    """The problem: the only message as it is, several with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
