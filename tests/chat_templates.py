"""Chat templates of the kinds that models ship, written for the tests; each shows one habit of the field."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_WITH_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
)

HEADERS_TRIMMED = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# A default system turn, which ends as all turns do, stands in front of the first user header.
HEADERS_ALWAYS_ASKING_WITH_DEFAULT_SYSTEM = (
    HEADERS_TRIMMED.replace("{% if add_generation_prompt %}", "")
    .removesuffix("{% endif %}")
    .replace(
        "{{ bos_token }}",
        "{{ bos_token }}{% if messages[0].role != 'system' %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nBe good.<|eot_id|>' }}{% endif %}",
    )
)

HEADERS_ALWAYS_ASKING = HEADERS_TRIMMED.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")

FIXED_DATE = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = "" %}
    {%- set rest = messages %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " }}
{{- date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in rest %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

TODAYS_DATE = FIXED_DATE.replace('"26 Jul 2024"', 'strftime_now("%d %b %Y")')

SYSTEM_IN_FIRST_USER = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set prefix = messages[0].content | trim + '\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set prefix = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate.') }}
    {%- endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

SYSTEM_UNTRIMMED = SYSTEM_IN_FIRST_USER.replace("messages[0].content | trim", "messages[0].content")

NO_SYSTEM = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {{- '<start_of_turn>' + message.role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>assistant\\n' }}{%- endif %}"""

LLAMA_2 = """\
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

SYSTEM_BEFORE_LAST_USER = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.last and system is defined else '') + message.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

EOS_BEHIND_LAST = CHATML.replace(
    "{% endfor %}", "{% if loop.last and message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

NUMBERED_TURNS = (
    "{% for message in messages %}{{ '[Round ' ~ (loop.index0 // 2) ~ '] ' + message.role + ': ' + message.content + "
    "'</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'x' }}{% endif %}"
)

# Drops earlier thinking, and opens the thinking of the answer that it asks for.
THINKING = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if not loop.last and '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Opens the thinking of every answer that it asks for, and drops it even from the answer it belongs to.
THINKING_OPENED = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') + eos_token }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

# Asks for an answer behind an empty thought, which it writes nowhere else.
EMPTY_THOUGHT = """\
{%- for message in messages %}
    {{- '<start_of_turn>' + message.role + '\\n' + message.content + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>assistant\\n<|channel>thought\\n<channel|>' }}{%- endif %}"""

# Opens a thought, and writes of thoughts no more than their end.
CLOSED_THOUGHT = """\
{%- for message in messages %}
    {{- '<start_of_turn>' + message.role }}
    {{- '</think>' if message.role == 'assistant' }}{{- message.content + '<end_of_turn>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>assistant<think>' }}{%- endif %}"""

# Writes `reasoning_content` of the last answer alone, as thinking models' templates do, and tools as JSON.
REASONING_AND_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools: ' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content and loop.index0 > ns.last %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + call.function.name + ' ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Marks its channels with special tokens, and ends answers, and calls, each with one of their own.
CHANNELS = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<start_of_turn>assistant<|start_header_id|>' }}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {{- 'call<|end_header_id|>' + call.function.name + call.function.arguments | tojson }}
            {%- endfor %}
            {{- '<|eot_id|>' }}
        {%- else %}
            {{- 'final<|end_header_id|>' + message.content + '<end_of_turn>' }}
        {%- endif %}
    {%- else %}
        {{- '<start_of_turn>' + message.role + '<|end_header_id|>' + message.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>assistant' }}{%- endif %}"""

# Walks through the arguments of a call, so it needs them as a mapping.
ARGUMENTS_AS_MAPPING = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name + '(' }}
        {%- for name, value in call.function.arguments.items() %}{{- name + '=' + value | tojson + ';' }}{%- endfor %}
        {{- ')' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Encodes the arguments whatever they are: a JSON string would be quoted a second time.
ARGUMENTS_TO_JSON = ARGUMENTS_AS_MAPPING.replace(
    "{%- for name, value in call.function.arguments.items() %}{{- name + '=' + value | tojson + ';' }}{%- endfor %}",
    "{{- call.function.arguments | tojson }}",
)

# Pastes the arguments into the text: they have to be a string.
ARGUMENTS_AS_TEXT = ARGUMENTS_AS_MAPPING.replace(
    "{%- for name, value in call.function.arguments.items() %}{{- name + '=' + value | tojson + ';' }}{%- endfor %}",
    "{{- '<' + call.function.arguments + '>' }}",
)

MARKED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
