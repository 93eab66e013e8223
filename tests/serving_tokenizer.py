"""The tokenizer that a tiny bundle serves with: any text goes in, and its chats may have tools."""

from __future__ import annotations

from pathlib import Path

from tests.builders import tiny_tokenizer

# In Qwen's manner: functions before the messages, each call in a tag of its own. As Qwen's, it
# refuses what it cannot put, and leaves messages of other roles out without a word.
TOOL_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\nFunctions:\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' and loop.first %}
        {{- raise_exception('a result comes after a call') }}
    {%- elif message.role in ('system', 'user', 'assistant', 'tool') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def serving_tokenizer(folder: Path, chat_template: str | None = TOOL_TEMPLATE) -> Path:
    """Write a tokenizer as a bundle has it to `folder`, and return the folder."""
    tiny_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder
