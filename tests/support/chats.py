"""Chat templates of the forms that models have, and conversations to render with them."""

from __future__ import annotations

TURNS = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""As of ChatML: the turns' marks are special tokens."""

OPENED = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.\
<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""With a system message of its own where none is given."""

HEADERS = """\
{{- bos_token }}
{%- set today = strftime_now("%d %b %Y") if strftime_now is defined else "" %}
{#- The first message may be the system's. -#}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
<|start|>system<|end|>

{{ "Today: " + (today | length > 0) | string }}
{{ system_message }}<|eot|>
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
"""As of Llama 3: headers, a date, and contents without spaces around them."""

STRICT = """\
{%- set ns = namespace(system="") -%}
{%- for message in messages if message.role != 'system' %}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('roles must alternate user/assistant') }}
  {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == 'system' %}{% set ns.system = message.content + '\\n\\n' %}{% continue %}{% endif %}
  {%- if message.role == 'user' %}
    {{- '[INST] ' + (ns.system if loop.last else '') + message.content + ' [/INST]' }}
  {%- else %}
    {%- generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
  {%- endif %}
{%- endfor %}
"""
"""As of Mistral: roles must alternate, the system message goes with the last user's, answers are marked."""

TOOLS = """\
{% if tools is not none and tools %}
tools: {{ tools | tojson(indent=2) }}
{% endif %}
{% for message in messages %}
    {% if loop.index > 4 %}
        {% break %}
    {% endif %}
    {% set text = message.content %}
    {% if '</think>' in text %}
        {% set text = text.split('</think>')[-1].lstrip('\\n') %}
    {% endif %}
<{{ message.role | upper }}>{{ {"text": text, "é<": message.role} | tojson }}</{{ message.role | upper }}>
{% endfor %}
{% if add_generation_prompt %}<ASSISTANT>{% endif %}
"""
"""With JSON, methods of texts, and blocks on lines of their own."""

TEMPLATES = {"turns": TURNS, "opened": OPENED, "headers": HEADERS, "strict": STRICT, "tools": TOOLS}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Return a conversation: texts of the user and the model in turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return [*([] if system is None else [{"role": "system", "content": system}]), *turns]


CHATS = {
    "one message": chat("Hello"),
    "with a system message": chat(" Hello \n", system="Be kind."),
    "an answer before": chat("a", "<think>\nhm\n</think>\n\nb", "c"),
    "odd texts": chat("é\u2028<b>&amp; \\n", "{{ 7 * 7 }} {% raw %}", '"quoted"', "", "\t\n"),
}
