"""Chat templates in the style of public families, each with small tokenizers that have its control tokens."""

from functools import cache
from typing import NamedTuple

from tiny_tokenizer import gpt2_like, llama_like
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.chat_template import CHAT_TEMPLATE


class Style(NamedTuple):
    """A chat template, and the tokens it needs."""

    template: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()  # which a model says: not special
    eos: str = "</s>"
    ends: tuple[str, ...] = ("</s>",)  # the texts of `stop_ids`
    takes_system: bool = True


CHATML = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN3 = """
{%- set last = namespace(query=0) %}
{%- for m in messages %}
{%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
{%- set last.query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}{%- for t in tools %}{{- t | tojson + '\n' }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set said = m.content %}{%- set thought = '' %}
{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
{%- elif '</think>' in said %}
{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > last.query and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}
{%- else %}{{- said }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '\n' if not loop.first or said }}
{{- '<tool_call>\n' + (call.function or call) | tojson + '\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
LLAMA2 = """
{%- set system = '' %}{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
{%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{%- set turns = messages[1:] %}{%- endif %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 is even) %}{{ raise_exception('roles must alternate') }}{%- endif %}
{%- set text = system + m.content if loop.first else m.content %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + text.strip() + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""
LLAMA3 = """
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
LLAMA31 = """
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}
{%- if m.tool_calls %}
{{- '<|python_tag|>' + m.tool_calls[0].function | tojson + '<|eom_id|>' }}
{%- elif m.role == 'tool' %}{{- m.content | tojson + '<|eot_id|>' }}
{%- else %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
MISTRAL = """
{%- set rest = messages[1:] if messages[0].role == 'system' else messages %}
{{- bos_token }}
{%- for m in rest %}
{%- if m.role == 'user' %}
{{- '[INST] ' }}
{%- if loop.last or not rest[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list %}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}{%- endif %}
{{- m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}
{%- endfor %}"""
GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
PHI3 = """
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""
ZEPHYR = """
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""
VICUNA = """
{%- if messages[0].role == 'system' %}{{- messages[0].content + ' ' }}
{%- else %}{{- 'A chat between a curious person and a helper. ' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- 'USER: ' + m.content + ' ' }}
{%- elif m.role == 'assistant' %}{{- 'ASSISTANT: ' + m.content + eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"""
R1 = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}
{%- elif m.role == 'user' %}{{- '<User>' + m.content }}
{%- else %}
{%- set said = m.content.split('</think>')[-1] if '</think>' in m.content else m.content %}
{{- '<Assistant>' + said + '<end_of_sentence>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<Assistant><think>\n' }}{%- endif %}"""
QWQ = """
{%- for m in messages %}
{%- set said = m.content %}
{%- if m.role == 'assistant' and not loop.last %}{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last and not said.startswith('<think>') %}
{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{{- said + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"""
COHERE = """
{{- bos_token }}
{%- for m in messages %}
{%- set names = {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'} %}
{{- '<|START_OF_TURN_TOKEN|>' + names[m.role] + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}"""
GRANITE = """
{%- for m in messages %}
{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + eos_token }}
{{- '\n' if not loop.last or add_generation_prompt }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""
OLMO2 = """
{{- bos_token }}
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' + m.content }}
{%- if m.role == 'assistant' %}{{- eos_token if loop.last else eos_token + '\n' }}{%- else %}{{- '\n' }}{%- endif %}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}
{%- endfor %}"""
FALCON = """
{%- for m in messages %}
{{- '\n\n' if not loop.first }}
{{- {'user': 'User: ', 'assistant': 'Falcon: ', 'system': ''}[m.role] }}
{{- m.content.strip().replace('\r\n', '\n').replace('\n\n', '\n') }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\n\nFalcon:' }}{%- endif %}"""
GLM = """
{{- '[gMASK]<sop>' }}
{%- set last = namespace(query=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.query = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' }}
{%- if m.role == 'assistant' %}
{%- set parts = m.content.split('</think>') %}
{%- set thought = parts[0].split('<think>')[-1].strip() if parts[1:] else '' %}
{{- '<think>' + (thought if loop.index0 > last.query else '') + '</think>\n' + parts[-1].strip() }}
{%- else %}{{- m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""
HERMES_TOOLS = """
{%- if tools %}
{{- '<|im_start|>system\nYou may call: ' + tools | tojson + '<|im_end|>\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<|im_start|>tool\n<tool_response>' + {'content': m.content} | tojson }}
{{- '</tool_response><|im_end|>\n' }}
{%- elif m.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- for call in m.tool_calls %}{{- '\n<tool_call>' + call.function | tojson + '</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
TAGGED = """
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}
{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
WORDS = """
{%- for m in messages %}
{{- {'user': '\n\nAsk:', 'assistant': '\n\nSay:', 'system': 'Note:'}[m.role] + ' ' }}
{%- if m.role == 'assistant' and not loop.last %}{{- m.content.split('</think>')[-1].strip() }}
{%- else %}{{- m.content.strip() }}{%- endif %}
{%- if m.role == 'assistant' and loop.last %}{{- eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\n\nSay:' }}{%- endif %}"""
TWICE = """
{%- for m in messages %}
{{- '<|' + m.role + '|>' + m.content + (' (again: ' + m.content + ')' if m.role == 'user' else '') + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

IM = ("<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
EOS_AND_IM = ("</s>", "<|im_end|>")
STYLES = {
    "default": Style(CHAT_TEMPLATE),
    "chatml": Style(CHATML, IM, (), ends=EOS_AND_IM),
    "chatml_think": Style(CHATML, IM, (*THINK, "<tool_call>", "</tool_call>"), "<|im_end|>", ("<|im_end|>",)),
    "qwen3": Style(QWEN3, IM, (*THINK, *CALLS), "<|im_end|>", ("<|im_end|>",)),
    "qwq": Style(QWQ, IM, THINK, "<|im_end|>", ("<|im_end|>",)),
    "llama2": Style(LLAMA2),
    "llama3": Style(LLAMA3, HEADERS, ends=("</s>", "<|eot_id|>")),
    "llama31": Style(LLAMA31, (*HEADERS, "<|eom_id|>", "<|python_tag|>"), ends=("</s>", "<|eot_id|>")),
    "mistral": Style(MISTRAL, ("[INST]", "[/INST]")),
    "gemma": Style(GEMMA, ("<start_of_turn>", "<end_of_turn>"), ends=("</s>", "<end_of_turn>"), takes_system=False),
    "phi3": Style(PHI3, ("<|end|>", *ROLES), ends=("</s>", "<|end|>")),
    "zephyr": Style(ZEPHYR),
    "vicuna": Style(VICUNA),
    "r1": Style(R1, ("<User>", "<Assistant>", "<end_of_sentence>"), THINK, "<end_of_sentence>", ("<end_of_sentence>",)),
    "cohere": Style(
        COHERE,
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ends=("</s>", "<|END_OF_TURN_TOKEN|>"),
    ),
    "granite": Style(GRANITE, ("<|start_of_role|>", "<|end_of_role|>")),
    "olmo2": Style(OLMO2),
    "falcon": Style(FALCON),
    "glm": Style(GLM, ("[gMASK]", "<sop>", *ROLES), THINK),
    "hermes": Style(HERMES_TOOLS, IM, CALLS, ends=EOS_AND_IM),
    "tagged": Style(TAGGED, IM, ends=EOS_AND_IM),
    "words": Style(WORDS),
    "twice": Style(TWICE, ("<|end|>", *ROLES), ends=("</s>", "<|end|>")),
}


@cache
def tokenizer_of(name: str, kind: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer with the template and tokens of a style: "bytes": byte-level BPE, "pieces": like SentencePiece."""
    style, make = STYLES[name], {"bytes": gpt2_like, "pieces": llama_like}[kind]
    tokenizer = make(chat_template=style.template, additional_special_tokens=list(style.special))
    tokenizer.add_tokens([AddedToken(each, special=False, normalized=False) for each in style.added])
    tokenizer.eos_token = style.eos
    return tokenizer
