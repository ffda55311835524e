"""Each data_format as messages, and what every kind of bad row is told."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmforge.data import RowLayout, RowProblem
from llmforge.data.blocks import read_rows
from llmforge.data.formats import in_messages_form
from llmforge.errors import DataError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be brief"}
MESSAGES = RowLayout()
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def problem(row, layout=MESSAGES):
    result = in_messages_form(row, layout)
    assert isinstance(result, RowProblem), result
    assert "\n" not in result.reason
    assert len(result.reason) < 300
    return result.reason


def problem_in_file(tmp_path, line: bytes, layout=MESSAGES):
    (tmp_path / "x.jsonl").write_bytes(line)
    (row,) = read_rows([str(tmp_path / "x.jsonl")], layout)
    assert isinstance(row.content, RowProblem)
    return row.content.reason


@pytest.mark.parametrize(
    ("layout", "row", "messages"),
    [
        (MESSAGES, {"messages": [SYSTEM, USER, ASSISTANT], "id": 3}, [SYSTEM, USER, ASSISTANT]),
        (RowLayout(columns={"messages": "chat"}), {"chat": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        (RowLayout("prompt_completion"), {"prompt": "hi", "completion": "ho"}, [USER, ASSISTANT]),
        (
            RowLayout("prompt_completion", {"prompt": "question", "completion": "answer", "system": "role"}),
            {"question": "hi", "answer": "ho", "role": "be brief", "prompt": "ignored"},
            [SYSTEM, USER, ASSISTANT],
        ),
        (RowLayout("alpaca"), {"instruction": "hi", "input": "", "output": "ho"}, [USER, ASSISTANT]),
        (RowLayout("alpaca"), {"instruction": "hi", "output": "ho", "input": None}, [USER, ASSISTANT]),
        (
            RowLayout("alpaca"),
            {"instruction": "Add.", "input": "1 2", "output": "ho", "system": "be brief"},
            [SYSTEM, {"role": "user", "content": "Add.\n\n1 2"}, ASSISTANT],
        ),
        (
            RowLayout("sharegpt"),
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho", "weight": 0}]},
            [USER, {**ASSISTANT, "weight": 0}],
        ),
        (
            RowLayout("sharegpt"),
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "be brief"},
            [SYSTEM, USER, ASSISTANT],
        ),
        (RowLayout("text", needs_assistant=False), {"text": "hi"}, [USER]),
        (RowLayout("alpaca"), {"messages": [USER, ASSISTANT]}, [USER, ASSISTANT]),
        (
            MESSAGES,
            {"messages": [USER, {**ASSISTANT, "weight": 1.0, "name": None}]},
            [USER, {**ASSISTANT, "weight": 1}],
        ),
        (RowLayout(needs_assistant=False), {"messages": [USER]}, [USER]),
        (MESSAGES, {"messages": [USER, ASSISTANT], "chosen": None, "rejected": None}, [USER, ASSISTANT]),
    ],
)
def test_every_format_becomes_messages(layout, row, messages):
    assert in_messages_form(row, layout) == {"messages": messages}


CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 42}'}}


def test_tools_and_tool_calls_are_kept():
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "42", "tool_call_id": "1", "name": "look"},
        ASSISTANT,
    ]
    assert in_messages_form({"messages": messages, "tools": TOOLS}, MESSAGES) == {"messages": messages, "tools": TOOLS}
    assert "has no tools" in problem({"messages": messages})
    assert "tools is 'x'" in problem({"messages": messages, "tools": "x"})


def test_reasoning_is_kept():
    for key in ("reasoning_content", "reasoning", "thinking"):
        messages = [USER, {**ASSISTANT, key: "hm"}]
        assert in_messages_form({"messages": messages}, MESSAGES) == {"messages": messages}
        assert f"has {key} 3, expected text" in problem({"messages": [USER, {**ASSISTANT, key: 3}]})
        assert "of an assistant turn" in problem({"messages": [{**USER, key: "hm"}, ASSISTANT]})


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        ("look", "has the text 'look' as tool_calls, expected a list"),
        (["look"], "has the tool call 'look', expected {"),
        ([{"id": "1"}], "expected {"),
        ([{"function": {"arguments": {}}}], "expected {"),
        ([{"function": {"name": "look", "arguments": [1]}}], "calls 'look' with a list as arguments"),
    ],
)
def test_malformed_tool_calls_are_named(calls, says):
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    assert says in problem({"messages": messages, "tools": TOOLS})


def test_calls_need_no_function_around_them():
    messages = [USER, {"role": "assistant", "content": "Look.", "tool_calls": [{"name": "look", "arguments": {}}]}]
    assert in_messages_form({"messages": messages}, MESSAGES) == {"messages": messages}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "no column 'messages' (data_format: messages); the row's columns: none"),
        ({"prompt": "a", "completion": "b"}, "the row's columns: 'prompt, completion'"),
        ({"messages": None}, "no column 'messages'"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": {"role": "user"}}, "messages is an object, expected a list"),
        ({"messages": "hello"}, "messages is the text 'hello', expected a list"),
        ({"messages": ["hello"]}, "message 1 is the text 'hello', expected an object"),
        ({"messages": [None]}, "message 1 is null"),
        ({"messages": [USER, {"content": "ho"}]}, "message 2 has no role, expected system, user, assistant"),
        ({"messages": [USER, {"role": "bot", "content": "ho"}]}, "message 2 has role 'bot', expected system"),
        ({"messages": [USER, {"role": ["x"], "content": "ho"}]}, "message 2 has role ['x']"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 has no content, expected text"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 2 has empty content, expected text"),
        ({"messages": [{"role": "system", "content": ""}, USER, ASSISTANT]}, "message 1 has empty content"),
        ({"messages": [USER, {"role": "assistant", "content": 42}]}, "message 2 has the number 42 as content"),
        (
            {"messages": [USER, {"role": "assistant", "content": b"x"}]},
            "message 2 has a value of type bytes as content",
        ),
        ({"messages": [USER, {"role": "assistant", "content": ["x"]}]}, "message 2 has a list as content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASSISTANT]},
            "message 1 holds an image, expected text; images need `task: vision_language`",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}, "half of a surrogate pair"),
        ({"messages": [USER, {**ASSISTANT, "mood": "x"}]}, "message 2 has the unknown key 'mood', expected role"),
        ({"messages": [USER, {**ASSISTANT, "weight": 2}]}, "message 2 has weight 2, expected 0 or 1"),
        ({"messages": [USER, {**ASSISTANT, "weight": True}]}, "message 2 has weight True, expected 0 or 1"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "message 2 has weight 0.5, expected 0 or 1"),
        ({"messages": [{**USER, "weight": 1}, ASSISTANT]}, "message 1 has a weight and role 'user'"),
        (
            {"messages": [USER]},
            "no assistant turn (roles: 'user'), expected at least one; `task: causal_lm` needs none",
        ),
        ({"messages": [ASSISTANT]}, "no user turn (roles: 'assistant')"),
        ({"messages": [SYSTEM, USER, SYSTEM, ASSISTANT]}, "2 system messages, expected at most one"),
        ({"chosen": [USER, ASSISTANT]}, "'chosen' without 'rejected'"),
        ({"rejected": [USER, ASSISTANT]}, "'rejected' without 'chosen'"),
        ({"chosen": [USER], "rejected": [USER]}, "pairs need `task: preference_tuning`"),
        ([1, 2], "a JSON list, expected one object a line"),
        ("hello", "not an object but 'hello'"),
        (None, "not an object but None"),
    ],
)
def test_bad_rows_say_what_was_given_and_what_was_expected(row, says):
    assert says in problem(row)


@pytest.mark.parametrize(
    ("layout", "row", "says"),
    [
        (RowLayout("prompt_completion"), {"prompt": "a"}, "no column 'completion' (data_format: prompt_completion)"),
        (RowLayout("prompt_completion"), {"prompt": "", "completion": "b"}, "column 'prompt' is empty"),
        (RowLayout("prompt_completion"), {"prompt": [USER], "completion": "b"}, "column 'prompt' is [{'role'"),
        (RowLayout("prompt_completion", {"prompt": "q"}), {"prompt": "a", "completion": "b"}, "no column 'q'"),
        (RowLayout("alpaca"), {"instruction": "a", "input": 3, "output": "b"}, "column 'input' is 3, expected text"),
        (RowLayout("alpaca"), {"messages": [USER, ASSISTANT], "output": "b"}, "both 'messages' and 'output'"),
        (RowLayout("sharegpt"), {"conversations": "a"}, "conversations is 'a', expected a list"),
        (RowLayout("sharegpt"), {"conversations": [USER]}, "turn 1 is from None, expected one of system, human"),
        (RowLayout("sharegpt"), {"conversations": [{"from": "human"}]}, "message 1 has no content"),
        (RowLayout("text"), {"text": "a"}, "no assistant turn"),
        (RowLayout("text"), {"chosen": "a"}, "'chosen' without 'rejected'"),
    ],
)
def test_bad_rows_of_the_other_formats(layout, row, says):
    assert says in problem(row, layout)


def test_a_layout_that_does_not_exist():
    with pytest.raises(DataError, match="choose one of messages, prompt_completion, alpaca, sharegpt, text"):
        RowLayout("jsonl")
    with pytest.raises(
        DataError, match="'question' is not a column of data_format 'prompt_completion', which has prompt"
    ):
        RowLayout("prompt_completion", {"question": "prompt"})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"messages": [', "not JSON: Expecting value at column 15, near 'ssages"),
        (b"hello", "not JSON: Expecting value at column 1, near 'hello'; expected one object a line"),
        (b"[", "`jq -c '.[]'`"),
        (b"[" * 100_000, "not JSON that can be read"),
        (b"1" * 10_000, "not JSON that can be read"),
        (b"{} {}", "not JSON: Extra data at column 4"),
        (b'{"messages": "\xe9"}', "not UTF-8: byte 0xe9 at position 15"),
        ('{"messages": []}'.encode("utf-16"), "not UTF-8: byte 0xff at position 1"),
        (b'\x00{"messages": []}', "not JSON"),
    ],
)
def test_lines_that_are_not_json(tmp_path, line, says):
    reason = problem_in_file(tmp_path, line)
    assert says in reason
    assert len(reason) < 300


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "role",
                    "content",
                    "weight",
                    "type",
                    "tools",
                    "from",
                    "value",
                    "prompt",
                    "chosen",
                    "text",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(row=json_values, data_format=st.sampled_from(["messages", "prompt_completion", "alpaca", "sharegpt", "text"]))
def test_any_json_value_is_a_conversation_or_a_problem(row, data_format):
    result = in_messages_form(row, RowLayout(data_format))
    if isinstance(result, RowProblem):
        assert 0 < len(result.reason) < 400
    else:
        assert {"user", "assistant"} <= {message["role"] for message in result["messages"]}


def test_parquet_and_jsonl_of_the_same_rows_read_alike(tmp_path):
    """Parquet fills in every key of every struct with null, and its text may be dictionary-encoded or large."""
    rows = [
        {"messages": [USER, {**ASSISTANT, "weight": 0}], "tools": None, "id": 1},
        {"messages": [{**USER, "name": "ann"}, ASSISTANT], "tools": None, "id": 2},
        {"messages": [USER], "tools": None, "id": 3},
        {"messages": [], "tools": None, "id": 4},
        {"messages": None, "tools": None, "id": 5},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=2)
    from_jsonl, from_parquet = (
        [(row.line, row.content) for row in read_rows([str(tmp_path / name)], MESSAGES)]
        for name in ("x.jsonl", "x.parquet")
    )
    assert from_parquet[:4] == from_jsonl[:4]
    assert [isinstance(content, RowProblem) for _, content in from_parquet] == [False, False, True, True, True]
