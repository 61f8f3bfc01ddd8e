"""Chat templates as checkpoints have them: Gemma's, what people made of it, and those of other models."""

from __future__ import annotations

ALTERNATE = "Conversation roles must alternate user/assistant/user/assistant/..."
GEMMA = (  # as in Google's tokenizer_config.json of gemma-2-2b-it
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('" + ALTERNATE + "') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# With text parts and a system message put before the first user message, as Gemma 3's does it.
PARTS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""
# Templates that write the ids of Gemma's turns.
GEMMAS = {
    "Google's": GEMMA,
    "Google's, its newlines escaped": GEMMA.replace("\n", "\\n"),
    "Google's without its BOS and check of roles": GEMMA[GEMMA.index("{% for") :],
    "comments in other turns": "{# it isn't <|im_start|> nor [INST] #}"
    + GEMMA.replace("{% for", "{#- ### Response: -#}{% for"),
    "text parts": PARTS,
    "system and user joined by a space": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{'<start_of_turn>user\n' + messages[0]['content'] | "
        "trim + ' ' + messages[1]['content'] | trim + '<end_of_turn>\n'}}{% set messages = messages[2:] %}{% endif %}"
        "{% for message in messages %}{% if message['role'] == 'user' %}{{'<start_of_turn>user\n' + message['content']"
        " | trim + '<end_of_turn>\n'}}{% elif message['role'] == 'assistant' %}{{'<start_of_turn>model\n' + "
        "message['content'] | trim + '<end_of_turn>\n' }}{% else %}{{ raise_exception('Only user and assistant roles "
        "are supported!') }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}"
        "{% endif %}"
    ),
    "marks for training": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ '<start_of_turn>model\n' }}{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}"
        "{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<start_of_turn>user\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "plain text between tags": (
        '{{ bos_token }}{% for m in messages %}<start_of_turn>{% if m.role == "assistant" %}model{% else %}{{ m.role }}'
        "{% endif %}{{ '\\n' + m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "the name of a role chosen in the turn": (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' ~ ('user' if m['role'] == 'user' else 'model') ~ "
        "'\\n' ~ m['content'] | trim ~ '<end_of_turn>' ~ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>' + 'model' + '\\n' }}{% endif %}"
    ),
    "tools that are not given": "{% if tools %}{{ tools | tojson }}{% endif %}" + GEMMA,
}
UNTRIMMED = (  # LLaMA-Factory's
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}{% set content = message['content'] %}{% if loop.index0 == 0 and "
    "system_message is defined %}{% set content = system_message + '\n\n' + message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '<start_of_turn>user\n' + content + '<end_of_turn>\n<start_of_turn>model\n'"
    " }}{% elif message['role'] == 'assistant' %}{{ content + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
)
# The intention is plain, but this writes white space around the turns.
INDENTED = """{{ bos_token }}
{% for message in messages %}
    {% set role = 'model' if message['role'] == 'assistant' else 'user' %}
    {{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}

{% if add_generation_prompt %}
    {{'<start_of_turn>model\\n'}}
{% endif %}"""
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OTHERS = {
    "ChatML": CHATML,
    "ChatML after a BOS": "{{ bos_token }}" + CHATML,
    "ChatML with Gemma's turns in a comment": "{# was: <start_of_turn>model\n<end_of_turn> #}" + CHATML,
    "ChatML that cuts Gemma's turns out": CHATML.replace(
        "message['content']", "message['content'].split('<start_of_turn>model\n')[0].split('<end_of_turn>')[0]"
    ),
    "Llama 2": "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}",
    "Llama 3": (
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
        "'<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    "Alpaca": "{% for m in messages %}{{ '### Instruction:\n' + m['content'] + '\n\n### Response:\n' }}{% endfor %}",
    "Vicuna": "{% for m in messages %}{{ 'USER: ' + m['content'] + ' ASSISTANT: ' }}{% endfor %}",
    "Mistral": "{{ bos_token }}{% for m in messages %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endfor %}",
    "Phi": "{% for m in messages %}{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}{% endfor %}",
    "Zephyr": "{% for m in messages %}{{ '<|user|>\n' + m['content'] + eos_token + '<|assistant|>' }}{% endfor %}",
    "DeepSeek": "{% for m in messages %}{{ '<\uff5cUser\uff5c>' + m.content + '<\uff5cAssistant\uff5c>' }}{% endfor %}",
    "Command-R": (
        "{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m['content'] + '<|END_OF_TURN_TOKEN|>' }}"
        "{% endfor %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
    ),
    "Gemma 4": "{% for m in messages %}{{ '<|turn>' + m['role'] + '\n' + m['content'] + '<turn|>\n' }}{% endfor %}",
    "Gemma's tags with the role as it is": (
        "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m.content + '<end_of_turn>\n' }}{% endfor %}"
    ),
    "an assistant in Gemma's tags": GEMMA.replace("'model'", "'assistant'").replace("model\n", "assistant\n"),
    "Gemma's tags without newlines": GEMMA.replace("\n", " "),
    "turns that do not end": GEMMA.replace("<end_of_turn>", ""),
    "the content alone": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "nothing": "",
    # Gemma's delimiters, and something else between them.
    "a system turn of its own": "{{ '<start_of_turn>system\nYou are a pirate.<end_of_turn>\n' }}" + GEMMA,
    "a system prompt in the user's turn": GEMMA.replace(
        "'\n' + message", "'\n' + ('You are a helpful pirate.\n\n' if loop.first else '') + message"
    ),
    "a word before each content": GEMMA.replace("'\n' + message", "'\nTranslate: ' + message"),
    "a user called human": GEMMA.replace("set role = message['role']", "set role = 'human'"),
    "a thought begun": GEMMA.replace("{{'<start_of_turn>model\n'}}", "{{'<start_of_turn>model\n<think>\n'}}"),
    "an end of text behind each turn": GEMMA.replace("'<end_of_turn>\n'", "'<end_of_turn>' + eos_token + '\n'"),
    "an empty line between turns": GEMMA.replace("<end_of_turn>\n'", "<end_of_turn>\n\n'"),
    "an empty line between turns, as text": GEMMA.replace("{% endfor %}", "\n\n{% endfor %}"),
    "white space around turns": INDENTED,
    "each content twice": GEMMA.replace("| trim +", "| trim + message['content'] | trim +"),
    "roles exchanged": GEMMA.replace("== 'assistant') %}", "!= 'assistant') %}"),
    "the last turn left out": GEMMA.replace("{{ '<start", "{% if not loop.last %}{{ '<start").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    ),
    "the third turn marked": GEMMA.replace("{% endfor %}", "{% if loop.index0 == 2 %}!{% endif %}{% endfor %}"),
    "the hundredth turn marked": GEMMA.replace("{% endfor %}", "{% if loop.index0 == 99 %}!{% endif %}{% endfor %}"),
    "a word that is answered": GEMMA.replace(
        "{% endfor %}", "{% if message['content'] == 'x' %}!{% endif %}{% endfor %}"
    ),
    "what is said in capitals": GEMMA.replace("| trim", "| upper"),
    "parts with an empty line between": PARTS.replace("item['text'] | trim", "item['text'] | trim + '\\n'"),
    "a date": "{{ strftime_now('%d %b') }}" + GEMMA,
    "a pad token where there is one": "{% if pad_token %}!{% endif %}" + GEMMA,
    "a method of a message": GEMMA.replace("{% endfor %}", "{% if message.items %}!{% endif %}{% endfor %}"),
    "a macro": "{% macro turn(m) %}{{ m }}{% endmacro %}" + GEMMA,
    "a namespace": "{% set ns = namespace(x='') %}" + GEMMA,
    "what is left of a loop": GEMMA.replace("{% endfor %}", "{% if loop.revindex0 %}!{% endif %}{% endfor %}"),
    "raw text": "{% raw %}{{ x }}{% endraw %}" + GEMMA,
    "no end": GEMMA.removesuffix("{% endif %}"),
}
