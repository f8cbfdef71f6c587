from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorakit.data.chat import encode_chat, encode_chat_prompt
from lorakit.data.encode import encode_split
from lorakit.data.examples import ChatExample
from lorakit.data.notes import split_notes
from lorakit.data.sources import Split
from lorakit.errors import DataError

CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "4"},
    {"role": "assistant", "content": "Yes, 4 é"},
)
#: Spaces around the assistant's words, as Llama 2 has them, and EOS behind.
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }} </s>"
    "{% else %}[{{ m['content'] | trim }}]{% endif %}{% endfor %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}</s>{% endfor %}"
)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def one_row(example: ChatExample, tokenizer: Any) -> tuple[list[int], list[bool]]:
    (row,) = encode_chat(example, tokenizer).rows
    return row.input_ids, row.loss_mask


def trained_parts(messages: tuple[dict[str, Any], ...], tokenizer: Any, **fields: Any) -> list[str]:
    """The trained segments of the chat, decoded separately."""
    ids, trained = one_row(ChatExample(messages, **fields), tokenizer)
    parts: list[list[int]] = []
    for index, (token, on) in enumerate(zip(ids, trained, strict=True)):
        if on and (index == 0 or not trained[index - 1]):
            parts.append([])
        if on:
            parts[-1].append(token)
    return [tokenizer.decode(part) for part in parts]


def test_assistant_turns_and_their_ends_are_trained(tokenizer: Any) -> None:
    assert trained_parts(CHAT, tokenizer) == ["4</s>", "Yes, 4 é</s>"]
    ids, _ = one_row(ChatExample(CHAT), tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(list(CHAT), tokenize=False)


def test_eos_after_white_space_is_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = SPACED
    assert trained_parts(CHAT, tokenizer) == [" 4 </s>", " Yes, 4 é </s>"]


def test_template_without_end_token_trains_the_content_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = WITHOUT_END
    assert trained_parts(CHAT, tokenizer) == ["4", "Yes, 4 é"]


def test_a_template_without_a_generation_prompt_trains_the_header_too(tokenizer: Any) -> None:
    tokenizer.chat_template = WITHOUT_END.partition("{% if add")[0]
    assert trained_parts(CHAT, tokenizer) == ["assistant: 4", "assistant: Yes, 4 é"]


def test_repeated_turn_is_distinguished(tokenizer: Any) -> None:
    chat = (
        {"role": "user", "content": "<assistant>a</s>"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "a"},
    )
    assert trained_parts(chat, tokenizer) == ["a</s>", "a</s>"]
    ids, trained = one_row(ChatExample(chat), tokenizer)
    text = tokenizer.decode([i for i, on in zip(ids, trained, strict=True) if not on])
    assert text == "<user><assistant>a</s></s><assistant><user>a</s><assistant>"


def test_prompt_is_the_text_before_the_turn_in_training(tokenizer: Any) -> None:
    ids, trained = one_row(ChatExample(CHAT), tokenizer)
    before = ids[: trained.index(True)]
    assert encode_chat_prompt(list(CHAT[:2]), tokenizer) == before


def test_text_before_the_content_is_trained_if_it_is_not_in_the_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content | length }}{{ m.content }}</s>{% endfor %}"
    )
    assert trained_parts(CHAT, tokenizer) == ["14</s>", "8Yes, 4 é</s>"]


LEAVES_OUT_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("content", ["Be brief.", "2+2?", "s", "4"])
def test_an_omitted_message_is_an_error(content: str, tokenizer: Any) -> None:
    """Also if its text occurs elsewhere in the chat."""
    tokenizer.chat_template = LEAVES_OUT_SYSTEM
    chat = ({"role": "system", "content": content}, *CHAT[1:])
    message = "message 1: the chat template omits this system message"
    with pytest.raises(DataError, match=message):
        encode_chat(ChatExample(chat), tokenizer)
    assert trained_parts(CHAT[1:], tokenizer) == ["4</s>", "Yes, 4 é</s>"]


def test_an_omitted_message_in_a_long_chat(tokenizer: Any) -> None:
    tokenizer.chat_template = LEAVES_OUT_SYSTEM
    long = CHAT[1:3] * 30
    with pytest.raises(DataError, match="message 31: "):
        encode_chat(ChatExample((*long[:30], CHAT[0], *long[30:])), tokenizer)


def test_changed_contents_are_found(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim | upper | e }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = (
        {"role": "user", "content": " a<b? \n"},
        {"role": "assistant", "content": "\nyes & no "},
    )
    assert trained_parts(chat, tokenizer) == ["YES &amp; NO</s>"]


CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Leith"}}}
ASKS = {"role": "user", "content": "When?"}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "c1", "name": "tide", "content": "14:05"}
ANSWERS = {"role": "assistant", "content": "At 14:05."}


def test_a_message_with_ignored_keys_only_is_an_error(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    message = r"message 2: .* omits this assistant message \(its tool calls\)"
    with pytest.raises(DataError, match=message):
        encode_chat(ChatExample((ASKS, CALLS, TOLD, ANSWERS)), tokenizer)
    reasons = {"role": "assistant", "content": "", "reasoning_content": "Tides."}
    with pytest.raises(DataError, match=r"message 2: .* \(its reasoning_content\)"):
        encode_chat(ChatExample((ASKS, reasons, ASKS, ANSWERS)), tokenizer)


def test_ignored_keys_are_counted(tokenizer: Any) -> None:
    thinks = {**ANSWERS, "reasoning_content": "Tides.", "tool_calls": [CALL]}
    chat = (ASKS, thinks, TOLD, {**ANSWERS, "thinking": "Again."})
    found = encode_chat(ChatExample(chat, None, (CALL,)), tokenizer).counts
    assert {key: count for key, count in found.items() if key.startswith("ignored:")} == {
        "ignored:tools": 1, "ignored:reasoning_content": 1, "ignored:thinking": 1,
        "ignored:tool_calls": 1, "ignored:tool_call_id": 1, "ignored:name": 1,
    }  # fmt: skip
    tokenizer.chat_template = (  # the name of a call, not that of a tool's message
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{% endfor %}</s>{% endfor %}"
    )
    found = encode_chat(ChatExample((ASKS, CALLS, TOLD, ANSWERS)), tokenizer).counts
    ignored = {key for key in found if key.startswith("ignored:")}
    assert ignored == {"ignored:name", "ignored:tool_call_id"}
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}</s>{% endfor %}"
    )
    found = encode_chat(ChatExample(chat, None, (CALL,)), tokenizer).counts
    assert not [key for key in found if key.startswith("ignored:")]
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content }}</s>"
        "{% endfor %}"
    )
    found = encode_chat(ChatExample(chat, None, (CALL,)), tokenizer).counts
    assert not {"ignored:reasoning_content", "ignored:thinking"} & set(found)


@pytest.mark.parametrize("turns", [1, 30])
def test_an_end_token_in_the_content_is_not_trained_twice(turns: int, tokenizer: Any) -> None:
    chat = (ASKS, ANSWERS, ASKS, {"role": "assistant", "content": "Now.</s>"}, ASKS, ANSWERS)
    wanted = ["At 14:05.</s>", "Now.</s>", "At 14:05.</s>"]
    assert trained_parts(chat * turns, tokenizer) == wanted * turns


def test_a_content_replaced_by_tool_calls_is_counted(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    )
    chat = (ASKS, {**CALLS, "content": "Let me look."}, {"role": "tool", "content": "5"}, ANSWERS)
    counts = encode_chat(ChatExample(chat), tokenizer).counts
    assert {key for key in counts if key.startswith("ignored:")} == {"ignored:content"}
    assert trained_parts(chat, tokenizer) == ["tide</s>", "At 14:05.</s>"]


def test_contents_in_parts(tokenizer: Any) -> None:
    """As in templates of multimodal models."""
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert trained_parts(CHAT, tokenizer) == ["4</s>", "Yes, 4 é</s>"]
    ids, trained = one_row(ChatExample(CHAT), tokenizer)
    assert ids[: trained.index(True)] == encode_chat_prompt(CHAT[:2], tokenizer)


def test_tokens_after_the_end_of_turn(tokenizer: Any) -> None:
    """Two tokens in a row end the turn, unless the first is EOS; a token on the next line does
    not."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", "<over>"]})
    template = "{% for m in messages %}{{ m.content }}END{% endfor %}"
    for end, trained in (("<end><over>", "<end><over>"), ("<end>\n<over>", "<end>"),
                         ("</s><over>", "</s>"), ("\n<end>\n</s>", "\n<end>")):  # fmt: skip
        tokenizer.chat_template = template.replace("END", end)
        assert trained_parts(CHAT[1:3], tokenizer) == [f"4{trained}"]


def test_untrained_turns_are_part_of_the_prompt(tokenizer: Any) -> None:
    flags = (False, False, False, False, True)
    assert trained_parts(CHAT, tokenizer, trained=flags) == ["Yes, 4 é</s>"]
    flags = (False, False, True, False, False)
    ids, _ = one_row(ChatExample(CHAT, flags), tokenizer)
    assert tokenizer.decode(ids) == "<system>Be brief.</s><user>2+2?</s><assistant>4</s>"
    with pytest.raises(DataError, match="no trained turn"):
        encode_chat(ChatExample(CHAT, (False,) * 5), tokenizer)


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}MARKED"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("marked", "parts", "count"),
    [
        ("{% generation %}So: {{ m.content }}</s>{% endgeneration %}",
         ["So: 4</s>", "So: Yes, 4 é</s>"], None),
        ("So: {%- generation -%}{{ m.content }}</s>{%- endgeneration -%}",
         ["4</s>", "Yes, 4 é</s>"], "late_marks"),
        ("{% generation %}So{% endgeneration %}: {% generation %}{{ m.content }}{% endgeneration %}"
         "</s>", ["So", "4", "So", "Yes, 4 é"], None),
        ("{% if loop.last %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}"
         "{{ m.content }}</s>{% endif %}", ["Yes, 4 é</s>"], None),
    ],
)  # fmt: skip
def test_marks_select_the_trained_text(
    marked: str, parts: list[str], count: str | None, tokenizer: Any
) -> None:
    tokenizer.chat_template = MARKED.replace("MARKED", marked)
    assert trained_parts(CHAT, tokenizer) == parts
    counts = encode_chat(ChatExample(CHAT), tokenizer).counts
    unmarked = {"unmarked_turns": 1} if len(parts) == 1 else {}
    assert {key: value for key, value in counts.items() if "mark" in key} == (
        {count: 2} if count else unmarked
    )
    flags = (False, False, False, False, True)
    assert trained_parts(CHAT, tokenizer, trained=flags) == parts[len(parts) // 2 :]


@pytest.mark.parametrize("turns", [2, 4, 30])
@pytest.mark.parametrize("which", ["loop.last", "m.quality != 'low'", "loop.index0 > 1"])
def test_marks_of_the_whole_chat_select_the_trained_text(
    turns: int, which: str, tokenizer: Any
) -> None:
    tokenizer.chat_template = MARKED.replace(
        "MARKED", "{% if WHICH %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}"
        "{{ m.content }}</s>{% endif %}".replace("WHICH", which)
    )  # fmt: skip
    chat: list[dict[str, Any]] = []
    for i in range(turns):
        quality = "low" if i % 2 == 0 else "high"
        chat += [ASKS, {"role": "assistant", "content": f"At {i}.", "quality": quality}]
    wanted = {
        "loop.last": [turns - 1],
        "m.quality != 'low'": list(range(1, turns, 2)),
        "loop.index0 > 1": list(range(1, turns)),
    }[which]
    assert trained_parts(tuple(chat), tokenizer) == [f"At {i}.</s>" for i in wanted]
    counts = encode_chat(ChatExample(tuple(chat)), tokenizer).counts
    assert counts["unmarked_turns"] == turns - len(wanted)
    assert ("ignored:quality" in counts) == ("quality" not in which)


def test_marks_may_depend_on_a_key_of_the_question(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED.replace(
        "MARKED", "{% if messages[loop.index0 - 1].good %}{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}"
    )  # fmt: skip
    chat = (ASKS, ANSWERS, {**ASKS, "good": True}, {**ANSWERS, "content": "Now."})
    assert trained_parts(chat, tokenizer) == ["Now.</s>"]
    assert "ignored:good" not in encode_chat(ChatExample(chat), tokenizer).counts


@pytest.mark.parametrize(
    "comment", ["{# {% generation %} #}", "{% raw %}{% generation %}{% endraw %}"]
)
def test_a_mark_in_a_comment_is_ignored(comment: str, tokenizer: Any) -> None:
    tokenizer.chat_template = comment + WITHOUT_END
    assert trained_parts(CHAT, tokenizer) == ["4", "Yes, 4 é"]


def test_marks_that_begin_in_the_prompt_or_are_missing(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<assistant>"
        "{{ m.content }}</s>{% endgeneration %}{% else %}<{{ m.role }}>{{ m.content }}</s>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert trained_parts(CHAT, tokenizer) == ["4</s>", "Yes, 4 é</s>"]
    assert encode_chat(ChatExample(CHAT), tokenizer).counts["early_marks"] == 2
    tokenizer.chat_template = MARKED.replace(
        "MARKED", "{% if m.content == '4' %}4</s>{% else %}{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}{% endif %}"
    )  # fmt: skip
    assert trained_parts(CHAT, tokenizer) == ["Yes, 4 é</s>"]
    assert encode_chat(ChatExample(CHAT), tokenizer).counts["unmarked_turns"] == 1


def test_a_chat_without_marks_is_an_error(tokenizer: Any) -> None:
    never = "{% if false %}{% generation %}{% endgeneration %}{% endif %}{{ m.content }}</s>"
    tokenizer.chat_template = MARKED.replace("MARKED", never)
    with pytest.raises(DataError, match="marks no part of the trained turns"):
        encode_chat(ChatExample(CHAT), tokenizer)


def test_another_template_for_chats_with_tools(tokenizer: Any) -> None:
    plain = tokenizer.chat_template
    with_tools = "{{ tools | tojson }}</s>" + plain
    tokenizer.chat_template = {"default": plain, "tool_use": with_tools}
    ids, trained = one_row(ChatExample(CHAT, None, (CALL,)), tokenizer)
    assert tokenizer.decode(ids).startswith('[{"type": "function"')
    assert ids[: trained.index(True)] == encode_chat_prompt(CHAT[:2], tokenizer, (CALL,))
    assert tokenizer.decode(one_row(ChatExample(CHAT), tokenizer)[0]).startswith("<system>")


def test_counts_are_reported_once(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}"
        "<think></think>{% endif %}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = [{"chat": CHAT}, {"chat": CHAT[1:3]}, {"chat": ({**ASKS, "name": "x"}, ANSWERS)}]
    split = Split("train", rows, "chats.jsonl", "0")
    found = encode_split(split, lambda row: ChatExample(row["chat"]), tokenizer, 100)
    texts = [tokenizer.decode(found[i].input_ids[found[i].loss_mask]) for i in range(len(found))]
    assert texts == [f"<think></think>{text}</s>" for text in ("4", "Yes, 4 é", "4", "At 14:05.")]
    assert found.trained_tokens == sum(int(found[i].loss_mask.sum()) for i in range(len(found)))
    assert split_notes(found, split, 100) == [
        "train: 1 of 3 chats became 2 training rows, with each trained turn in one of them: an "
        "earlier turn renders or tokenizes differently once a later one follows",
        "train: the chat template ignores these keys of messages: 'name' (1)",
    ]


def test_a_single_turn_loses_the_beginning_of_its_prompt(tokenizer: Any) -> None:
    split = Split("train", [{}], "chats.jsonl", "0")
    found = encode_split(split, lambda _: ChatExample(CHAT[:3]), tokenizer, 12)
    assert tokenizer.decode(found[0].input_ids) == "assistant>4</s>"
    assert (found.counts.truncated_rows, found.counts.cut_completions) == (1, 0)


def test_rows_of_a_split_chat_lose_the_beginning_of_their_prompts(tokenizer: Any) -> None:
    tokenizer.chat_template = SPACED.replace(" {{ m['content'] }} </s>",
                                             "{{ '!' if loop.last }}{{ m['content'] }}</s>")  # fmt: skip
    split = Split("train", [{}], "chats.jsonl", "0")
    found = encode_split(split, lambda _: ChatExample(CHAT), tokenizer, 12)
    texts = [tokenizer.decode(found[i].input_ids) for i in range(len(found))]
    assert texts == ["f.][2+2?]!4</s>", "]!Yes, 4 é</s>"]
    assert (found.counts.truncated_rows, found.counts.cut_completions) == (2, 0)


def test_errors_name_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = ALTERNATES
    rows = [{"chat": CHAT[1:3]}, {"chat": CHAT}]
    split = Split("train", rows, "chats.jsonl", "0")
    message = r"chats\.jsonl, row 2: the chat template rejects the messages: roles must alternate"
    with pytest.raises(DataError, match=message):
        encode_split(split, lambda row: ChatExample(row["chat"]), tokenizer, 100)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        encode_split(split, lambda row: ChatExample(row["chat"]), tokenizer, 100)


def test_long_chats_lose_their_end(tokenizer: Any) -> None:
    split = Split("train", [{}, {}], "chats.jsonl", "0")
    short = encode_split(split, lambda _: ChatExample(CHAT), tokenizer, 60)
    whole, _ = one_row(ChatExample(CHAT), tokenizer)
    assert short[0].input_ids.tolist() == whole[:60]
    assert (short.counts.truncated_rows, short.counts.cut_completions) == (2, 2)
    with pytest.raises(DataError, match=r"row 1: nothing to train on within task.max_length = 20"):
        encode_split(split, lambda _: ChatExample(CHAT), tokenizer, 20)


def test_the_template_of_smollm2(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert trained_parts(CHAT, tokenizer) == ["4<|im_end|>", "Yes, 4 é<|im_end|>"]
    assert trained_parts(CHAT[1:], tokenizer) == ["4<|im_end|>", "Yes, 4 é<|im_end|>"]


#: Each asks in another way for an empty block, which the chat with the answer in it has as well.
ASKING = (
    "'/q' in messages[i].content",
    "messages[i]['content'].endswith('/q')",
    "messages[i].content == '/q'",
    "messages[i].content | length < 3",
    "messages[i].quick",
    "messages[i].mode == 'quick'",
)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("asking", ASKING)
def test_a_prompt_that_depends_on_the_question_does_so_in_long_chats(
    asking: str, both: bool, tokenizer: Any
) -> None:
    here = asking.replace("[i]", "[loop.index0 - 1]") if both else "false"
    last = asking.replace("[i]", "[-1]")
    tokenizer.chat_template = (
        (
            "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and HERE %}(){% endif %}"
            "{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% if LAST %}(){% endif %}{% endif %}"
        )
        .replace("HERE", here)
        .replace("LAST", last)
    )
    plain = {"mode": "long", "quick": False}
    asks = [{"role": "user", "content": f"What of {i}?", **plain} for i in range(40)]
    asks[3] = {"role": "user", "content": "/q", "mode": "quick", "quick": True}
    chat = tuple(m for ask in asks for m in (ask, ANSWERS))
    for row in encode_chat(ChatExample(chat), tokenizer).rows:
        starts = [i for i, on in enumerate(row.loss_mask) if on and not row.loss_mask[i - 1]]
        for turn, start in zip(row.turns, starts, strict=True):
            assert row.input_ids[:start] == encode_chat_prompt(chat[:turn], tokenizer), turn


THINKS = {"role": "assistant", "content": "<think>7*13</think>No."}


@pytest.mark.parametrize("turns", [1, 30])
@pytest.mark.parametrize(
    ("content", "left_out"),
    [
        ("m.content.split('</think>')[-1]", 1),
        ("m.content[:3]", 2),
        ("m.content[8:]", 2),
        ("m.content.split('.')[0]", 2),
        ("m.content | trim | upper | e", 0),
        ("m.content | tojson", 0),
        ("'<think>\n' ~ m.content.split('</think>')[0].split('<think>')[-1] ~ '\n</think>\n'"
         " ~ m.content.split('</think>')[-1]", 0),
    ],
)  # fmt: skip
def test_a_truncated_content_is_counted(
    content: str, left_out: int, turns: int, tokenizer: Any
) -> None:
    tokenizer.chat_template = MARKED.replace("MARKED", "{{ " + content + " }}</s>")
    chat = (ASKS, THINKS, ASKS, ANSWERS) * turns
    counts = encode_chat(ChatExample(chat), tokenizer).counts
    assert counts["shortened_turns"] == left_out * turns
    split = Split("train", [{}], "chats.jsonl", "0")
    notes = split_notes(encode_split(split, lambda _: ChatExample(chat), tokenizer, 9999), split, 9)
    said = f"drops part of the content of {left_out * turns} of {2 * turns} trained turns"
    assert any(said in note for note in notes) == (left_out > 0)


#: The prompt of a model that does not reason: an empty block, which is closed.
CLOSED = """\
{%- for m in messages %}
{{- '<' ~ m.role ~ '>' }}
{%- set text = m.content or '' %}
{%- if m.role == 'assistant' and loop.last %}
{%- set reasoning = m.reasoning_content or '' %}
{%- if '</think>' in text %}
{%- set reasoning = text.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set text = text.split('</think>')[-1].lstrip() %}
{%- endif %}
{{- '<think>\n' ~ reasoning ~ '\n</think>\n\n' }}
{%- endif %}
{{- text }}
{%- for call in m.tool_calls or [] %}{{ '[' ~ call.function.name ~ ']' }}{% endfor %}
{{- '</s>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant><think>\n\n</think>\n\n' }}{% endif %}"""


@pytest.mark.parametrize("turns", [1, 25])
@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        ({"content": "No.", "reasoning_content": "7*13"}, "No.</s>"),
        ({"content": "<think>\n7*13\n</think>\n\nNo."}, "No.</s>"),
        ({"content": "", "reasoning_content": "7*13", "tool_calls": [CALL]}, "[tide]</s>"),
        ({"content": "No."}, "No.</s>"),
    ],
)
def test_reasoning_after_a_prompt_that_closes_it_is_left_out_and_counted(
    answer: dict[str, Any], trained: str, turns: int, tokenizer: Any
) -> None:
    tokenizer.chat_template = CLOSED
    chat = (ASKS, {"role": "assistant", **answer}) * turns
    found = encode_chat(ChatExample(chat), tokenizer)
    texts = []
    for row in found.rows:
        (index,), start = row.turns, row.loss_mask.index(True)
        assert row.input_ids[:start] == encode_chat_prompt(chat[:index], tokenizer)
        texts.append(
            tokenizer.decode([i for i, on in zip(row.input_ids, row.loss_mask, strict=True) if on])
        )
    assert texts == [trained] * turns
    reasons = len(answer) > 1 or "think" in answer["content"]
    assert found.counts["turns_without_reasoning"] == turns * reasons
    assert not found.counts["shortened_turns"]


@pytest.mark.parametrize(
    "condition",
    [
        "messages | selectattr('content', 'equalto', '/q') | list | length > 0",
        "seen.quick",
        "messages[-1].content[0] == '/'",
        "messages[-1].content == messages[0].content",
        "messages | length == 51",
        "messages | length % 6 == 1",
        "messages.index(messages[-1]) < messages | length - 1",
        "messages[-1].content | int(-1) >= 0",
        "messages[-1].content < 'B'",
    ],
)
def test_a_prompt_that_depends_on_the_chat_is_the_same_in_long_chats(
    condition: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = (
        "{% set seen = namespace(quick=false) %}{% set on, off = '/q', '/p' %}"
        "{% for m in messages %}{% if m.role == 'user' and on in m.content %}"
        "{% set seen.quick = true %}{% elif off in m.content %}{% set seen.quick = false %}{% endif %}"
        "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% if CONDITION %}(){% endif %}{% endif %}"
    ).replace("CONDITION", condition)
    other = {7: "/q", 20: "So /p", 33: "/q", 35: "What of 0?", 38: "12"}
    chat = tuple(
        message
        for i in range(40)
        for message in ({"role": "user", "content": other.get(i, f"What of {i}?")}, ANSWERS)
    )
    found = encode_chat(ChatExample(chat), tokenizer).rows
    monkeypatch.setattr("lorakit.data.chat.long_chat.EXACT_COST", 10**6)
    assert found == encode_chat(ChatExample(chat), tokenizer).rows
