"""Prompts: every kind of data set in, checked at once; left-padded rows out, in an order that is a pure function."""

import contextlib
import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hfpg.config import ConfigError
from hfpg.data import (
    RESERVED_COLUMNS,
    PromptData,
    decode_completions,
    load_prompts,
    order,
    read_chat_template,
    share,
)
from hfpg.files import refuse_other
from hfpg.types import Samples
from tests import tiny


TEMPLATE = (
    "<eos> {% for m in messages %}{{ 'ba ' if m.role == 'user' else 'ca ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}za{% endif %}"
)


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": c} for c in contents]


def tokenizer_that_adds_bos(**kwargs: Any) -> Any:
    """A tokenizer that puts <eos> in front of every text, as Llama's puts its BOS."""
    from tokenizers.processors import TemplateProcessing

    made = tiny.tokenizer(**kwargs)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    return made


def refusal(dataset: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        PromptData(dataset, settings.pop("tokenizer", tiny.tokenizer()), **settings)
    return str(caught.value)


# ── what goes in


def test_a_list_and_a_dataset_are_the_same():
    rows = tiny.rows(9)
    a, b = (PromptData(d, tiny.tokenizer()) for d in (rows, datasets.Dataset.from_list(rows)))
    assert a.prompts == b.prompts == [row["prompt"] for row in rows]
    assert a.columns == b.columns == {"number": list(range(9))}
    assert a.encoded == b.encoded == tiny.tokenizer()([row["prompt"] for row in rows]).input_ids
    assert len(a) == 9


def test_a_column_that_some_rows_lack_is_none_there():
    data = PromptData([{"prompt": "aa"}, {"prompt": "ba", "answer": 3}], tiny.tokenizer())
    assert data.columns == {"answer": [None, 3]}


def test_the_prompt_column_can_have_another_name():
    data = PromptData([{"text": "aa ba", "n": 1}], tiny.tokenizer(), prompt_column="text")
    assert data.prompts == ["aa ba"] and data.columns == {"n": [1]}


def test_the_data_set_and_the_tokenizer_stay_as_they_are(caplog: pytest.LogCaptureFixture):
    rows, tokenizer = tiny.rows(5), tiny.tokenizer(padding_side="right")
    before = [dict(row) for row in rows]
    with caplog.at_level(logging.INFO, "hfpg.data"):
        data = PromptData(rows, tokenizer)
    assert "the tokenizer pads on the right; prompts are padded on the left here" in caplog.text
    assert rows == before and tokenizer.padding_side == "right" and tokenizer.pad_token is None
    assert not data.rows([0, 4], torch.tensor([0, 1]), 1, "cpu").mask[0, 0]  # padded on the left all the same


@pytest.mark.parametrize("kind", ["stream", "generator", "string"])
def test_what_cannot_be_replayed_is_refused_by_name(kind: str):
    stream = datasets.Dataset.from_list(tiny.rows(3)).to_iterable_dataset()
    dataset = {"stream": stream, "generator": (r for r in tiny.rows(3)), "string": "aa"}[kind]
    message = refusal(dataset)
    assert message.startswith(f"{type(dataset).__name__} is not supported: its order cannot be replayed")
    assert "Dataset.from_list(list(stream.take(10_000)))" in message


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (
            pandas.DataFrame(tiny.rows(3)),
            "a DataFrame is not read; give the trainer `datasets.Dataset.from_pandas(frame)`",
        ),
        ({"prompt": ["aa", "ba"]}, "a dict is not read; give the trainer `datasets.Dataset.from_dict(data)`"),
        (
            {"train": tiny.rows(3), "test": tiny.rows(2)},
            "the data set is a dict of splits; give the trainer one of them, such as dataset['train']",
        ),
    ],
)
def test_rows_in_another_form_are_refused_with_the_way_to_give_them(dataset: Any, said: str):
    assert refusal(dataset) == said


def test_a_folder_of_save_to_disk_is_a_data_set(tmp_path: Path):
    rows = datasets.Dataset.from_list([json.loads(row) for row in ROWS])
    rows.save_to_disk(tmp_path / "rows")
    train, held_out = load_prompts(str(tmp_path / "rows"), 4)
    assert sorted([*train["prompt"], *held_out["prompt"]]) == sorted(rows["prompt"])


@pytest.mark.parametrize("dataset", [[], (), datasets.Dataset.from_dict({"prompt": []})])
def test_an_empty_data_set(dataset: Any):
    assert refusal(dataset) == "the data set is empty; it needs rows with a prompt"


def test_a_row_that_is_no_dict():
    assert refusal([{"prompt": "aa"}, "ba"]).startswith("row 1 of the data set is 'ba'; expected a dict such as")


def test_a_missing_column_names_the_nearest():
    message = refusal([{"promt": "aa", "x": 1}])
    assert message.startswith("the data set has no column 'prompt'; it has ['promt', 'x']; did you mean 'promt'?")
    assert message.endswith("Name it with prompt_column")


@pytest.mark.parametrize("name", RESERVED_COLUMNS)
def test_a_reserved_column_is_refused(name: str):
    assert refusal([{"prompt": "aa", name: 1}]).startswith(f"column ['{name}'] is reserved")


@pytest.mark.parametrize("bad", ["", None, "  \n", []])
def test_empty_and_missing_prompts_are_named_by_row(bad: Any):
    rows = [{"prompt": bad if i in (1, 4, 6, 7) else "aa"} for i in range(9)]
    assert refusal(rows) == "4 prompts are empty or missing (rows [1, 4, 6], counted from 0); remove these rows"


def test_a_prompt_without_any_token_is_as_good_as_empty():
    """A normalizer may leave nothing of a text that is not blank (a zero-width space, a soft hyphen)."""
    from tokenizers.normalizers import Replace

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = Replace("\u200b", "")
    assert "(rows [1], counted" in refusal([{"prompt": "aa"}, {"prompt": "\u200b"}], tokenizer=tokenizer)


@pytest.mark.parametrize("bad", [3, ["aa", "ba"], [{"content": "no role"}], {"role": "user"}])
def test_a_prompt_of_another_kind_is_named_by_row(bad: Any):
    message = refusal([{"prompt": "aa"}, {"prompt": bad}])
    assert message.startswith("the prompt of row 1 is ") and "expected text, or a list of messages" in message


# ── conversations


def test_a_conversation_goes_through_the_template_and_ends_where_the_assistant_begins():
    tokenizer = tokenizer_that_adds_bos()
    tokenizer.chat_template = TEMPLATE
    conversation = [*chat("aa da"), {"role": "assistant", "content": "ea"}, *chat("fa")]
    data = PromptData([{"prompt": conversation}], tokenizer)
    # one <eos>, written by the template; adding special tokens once more would give two
    assert tokenizer.convert_ids_to_tokens(data.encoded[0]) == "<eos> ba aa da ca ea ba fa za".split()
    assert data.prompts == [conversation]


def test_a_text_prompt_gets_the_special_tokens_of_its_tokenizer():
    data = PromptData([{"prompt": "aa ba"}], tokenizer_that_adds_bos())
    assert data.encoded == [[0, *tiny.tokenizer()("aa ba").input_ids]]


def test_an_end_that_the_tokenizer_sets_is_no_part_of_a_prompt(caplog: pytest.LogCaptureFixture):
    from tokenizers.processors import TemplateProcessing

    ends = tiny.tokenizer(bos_token="aa")
    both = [("aa", 2), ("<eos>", 0)]
    ends.backend_tokenizer.post_processor = TemplateProcessing(single="aa $A <eos>", special_tokens=both)
    assert PromptData([{"prompt": "ba"}, {"prompt": "ba ca"}], ends).encoded == [[2, 3], [2, 3, 4]]
    assert "sets '<eos>' behind every text: it is left out" in caplog.text
    assert PromptData([{"prompt": "ba <eos>"}], tiny.tokenizer()).encoded == [[3, 0]], "it is the user's"


def test_a_prompt_that_begins_as_the_tokenizer_begins_it_is_warned_of(caplog: pytest.LogCaptureFixture):
    assert PromptData([{"prompt": "<eos> ba"}], tokenizer_that_adds_bos(bos_token="<eos>")).encoded == [[0, 0, 3]]
    assert "1 prompts begin with '<eos>', and the tokenizer adds another one (row 0" in caplog.text


def test_an_answer_that_was_begun_is_gone_on_with():
    tokenizer = tiny.tokenizer(chat_template=TEMPLATE)
    begun = [*chat("da"), {"role": "assistant", "content": "ea fa"}]
    (ids,) = PromptData([{"prompt": begun}], tokenizer).encoded
    assert tokenizer.convert_ids_to_tokens(ids) == ["<eos>", "ba", "da", "ca", "ea", "fa"]
    nothing = [*chat("da"), {"role": "assistant", "content": None, "tool_calls": [{}]}]
    assert "row 0 has no content" in refusal([{"prompt": nothing}], tokenizer=tokenizer)


def test_rows_are_read_whatever_their_format():
    plain = datasets.Dataset.from_dict({"prompt": [chat("aa"), chat("ba")], "n": [1, 2]})
    for made in (plain, plain.with_format("numpy"), plain.with_format("torch")):
        data = PromptData(made, tiny.tokenizer(chat_template=TEMPLATE))
        assert data.prompts[1] == chat("ba") and data.columns == {"n": [1, 2]} and type(data.columns["n"][0]) is int
    shown = plain.with_transform(
        lambda rows: {"prompt": [m[0]["content"] for m in rows["prompt"]]}, columns=["prompt"]
    )
    assert PromptData(shown.select_columns(["prompt"]), tiny.tokenizer()).prompts == ["aa", "ba"]


def test_splits_are_no_data_set():
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"prompt": ["aa"]}))
    for given in (splits, dict(splits)):
        assert f"is a {type(given).__name__} of splits; give the trainer one of them, such as dataset['train']" in (
            refusal(given)
        )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a\ud800"}, "the prompt of row 0 has half of a surrogate pair"),
        ({"prompt": chat("a\ud800")}, "the prompt of row 0 has half of a surrogate pair"),
        ({"prompt": "aa", 3: "x"}, "columns named [3]; a name is a text"),
        ({"text": "aa", "hfpg_row": 1}, "has no column 'prompt'; it has ['text']."),
    ],
)
def test_what_no_tokenizer_and_no_function_can_take(row: Any, said: str):
    assert said in refusal([row])


def test_a_column_called_prompt_beside_the_prompts_is_a_column():
    data = PromptData([{"question": "aa", "prompt": "ba"}], tiny.tokenizer(), prompt_column="question")
    assert data.prompts == ["aa"] and data.columns == {"prompt": ["ba"]}


def test_a_conversation_in_a_dataset_is_the_same():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [{"prompt": chat("aa")}, {"prompt": chat("ba", "ca")}]
    a, b = (PromptData(d, tokenizer) for d in (rows, datasets.Dataset.from_list(rows)))
    assert a.encoded == b.encoded and a.prompts == b.prompts


def test_a_conversation_without_a_template_is_refused_and_never_joined():
    message = refusal([{"prompt": chat("aa")}])
    assert message.startswith("the prompts are conversations, but the tokenizer has no chat template")
    assert "--chat_template" in message


def test_mixed_kinds_are_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    message = refusal([{"prompt": "aa"}, {"prompt": chat("aa")}, {"prompt": "ba"}], tokenizer=tokenizer)
    assert message == "1 of 3 prompts are conversations and the others text; use one kind"


def test_a_template_file(tmp_path: Path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    assert read_chat_template(str(tmp_path / "chat.jinja")) == TEMPLATE
    with pytest.raises(ConfigError, match="chat_template='.*no.jinja' cannot be read: No such file.*Jinja file"):
        read_chat_template(str(tmp_path / "no.jinja"))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("a\n{% for m in %}", "the chat template, line 2: "),
        ("{{ raise_exception('roles must alternate') }}", "the chat template: roles must alternate (for [{'role': "),
        ("{{ messages[0].content + 1 }}", "the chat template: can only concatenate str"),
    ],
)
def test_a_template_that_cannot_be_used(template: str, said: str):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    message = refusal([{"prompt": chat("aa")}], tokenizer=tokenizer)
    assert message.startswith(said) and message.endswith("with --chat_template, or use text prompts")


def test_a_message_without_content():
    message = refusal([{"prompt": chat("aa")}, {"prompt": [*chat("aa"), {"role": "user", "contents": "x"}]}])
    assert message.startswith("a message in the prompt of row 1 has no content: [{'role': 'user', 'contents': 'x'}]; ")


# ── files

ROWS = [json.dumps({"prompt": f"Film {i} is", "n": i}) for i in range(20)]


def save(folder: Path, name: str, text: str) -> str:
    opened = gzip.open if name.endswith(".gz") else open
    with opened(folder / name, "wt", encoding="utf-8") as file:
        file.write(text)
    return str(folder / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.jsonl.gz", "a.json", "a.csv", "a.parquet", "a.txt"])
def test_a_file_of_any_kind(name: str, tmp_path: Path):
    texts = {"a.json": f"[{','.join(ROWS)}]", "a.txt": "\n".join(f"Film {i} is" for i in range(20))}
    source = save(tmp_path, name, texts.get(name, "\n".join(ROWS)))
    rows = datasets.Dataset.from_list([json.loads(row) for row in ROWS])
    if name in ("a.csv", "a.parquet"):
        getattr(rows, f"to_{name[2:]}")(source)
    train, held_out = load_prompts(source, 4)
    assert not datasets.are_progress_bars_disabled()
    train, held_out = (PromptData(d, tiny.tokenizer()) for d in (train, held_out))
    assert sorted(train.prompts + held_out.prompts) == sorted(rows["prompt"])
    assert list(train.columns) == ([] if name == "a.txt" else ["n"]), "the row's number reaches nobody"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "", "the data set '{}' is empty; it needs rows with a prompt"),
        ("a.csv", "", "the data set '{}' is empty; it needs rows with a prompt"),
        ("a.jsonl", "\n".join([*ROWS[:6], '{"prompt": "x', *ROWS]), "{}:7: not valid JSON: Unterminated string"),
        ("a.jsonl.gz", "\n".join([*ROWS[:6], '{"prompt": "x', *ROWS]), "{}:7: not valid JSON: Unterminated string"),
        ("a.json", "[\n" + ",\n".join(ROWS).replace('"n": 7', '"n" 7') + "]", "{}:9: not valid JSON: Expecting ':'"),
        ("a.jsonl", "\n".join([*ROWS, "[3]"]), "{}:21: '[3]' is no row; expected one such as {{\"prompt\": …}}"),
        ("a.csv", "prompt,n\na,1\nb,1,2,3\n", "cannot load the data set '{}': Error tokenizing data. C error: Exp"),
        ("a.xlsx", "x", "'{}' is a file of a kind that is not read; use .jsonl, .json, .csv, .parquet, .txt, or one"),
    ],
)
def test_a_file_that_is_broken_is_named_with_its_line(name: str, text: str, said: str, tmp_path: Path, capfd: Any):
    source = save(tmp_path, name, text)
    with pytest.raises(ConfigError) as caught:
        load_prompts(source, 4)
    assert str(caught.value).startswith(said.format(source))
    assert capfd.readouterr() == ("", "")


def test_rows_of_a_file_keep_their_numbers(tmp_path: Path):
    """The split shuffles them."""
    source = save(tmp_path, "a.jsonl", "\n".join([*ROWS[:13], json.dumps({"prompt": "", "n": 0}), *ROWS]))
    said = ""
    for part in load_prompts(source, 4):
        with contextlib.suppress(ConfigError):
            PromptData(part, tiny.tokenizer())
            continue
        said = refusal(part)
    assert said == "1 prompts are empty or missing (rows [13], counted from 0); remove these rows"


# ── length


LONG = [{"prompt": "aa ba ca da", "n": 0}, {"prompt": "aa", "n": 1}, {"prompt": "ea fa ga", "n": 2}]


def test_prompts_that_are_too_long_raise_with_rows_and_ways_out():
    message = refusal(LONG, context=10, max_completion_length=8)
    assert message.startswith("2 prompts have more than 2 tokens (rows [0, 2], counted from 0; the longest has 4)")
    assert "overlong_prompts to 'truncate' or 'drop', or a smaller max_completion_length" in message


def test_truncate_keeps_the_end(caplog: pytest.LogCaptureFixture):
    data = PromptData(LONG, tiny.tokenizer(), context=10, max_completion_length=8, overlong="truncate")
    assert [tiny.tokenizer().decode(ids) for ids in data.encoded] == ["ca da", "aa", "fa ga"]
    assert "2 prompts have more than 2 tokens" in caplog.text and "beginning is cut" in caplog.text


def test_drop_takes_the_whole_row(caplog: pytest.LogCaptureFixture):
    data = PromptData(LONG, tiny.tokenizer(), context=10, max_completion_length=8, overlong="drop")
    assert (data.prompts, data.columns, len(data.encoded), len(data)) == (["aa"], {"n": [1]}, 1, 1)
    assert "2 prompts have more than 2 tokens" in caplog.text and "dropped" in caplog.text


def test_a_prompt_that_just_fits_is_left_alone():
    assert PromptData(LONG, tiny.tokenizer(), context=12, max_completion_length=8).encoded[0]
    assert PromptData(LONG, tiny.tokenizer(), context=None, max_completion_length=10**6).encoded[0]


def test_a_completion_longer_than_the_context():
    message = refusal(LONG, context=8, max_completion_length=8)
    assert message.startswith("max_completion_length=8 leaves no room for a prompt in the 8 tokens that the model can")
    assert message.endswith("such as 4")


def test_dropping_every_prompt():
    message = refusal(
        LONG, context=9, max_completion_length=9 - 1, overlong="drop", tokenizer=tokenizer_that_adds_bos()
    )
    assert (
        "3 prompts have more than 1 tokens" in message and "overlong_prompts='drop' leaves none; use 'trunc" in message
    )


# ── what comes out


def test_rows_are_left_padded_by_mask_and_repeated_for_each_sample():
    data = PromptData(LONG, tiny.tokenizer())
    prompts = data.rows([2, 1], torch.tensor([40, 41, 42, 43]), 2, "cpu")
    assert prompts.mask.tolist() == [[True] * 3] * 2 + [[False, False, True]] * 2
    for row, i in enumerate([2, 2, 1, 1]):
        assert prompts.ids[row][prompts.mask[row]].tolist() == data.encoded[i]
    assert prompts.sample_ids.tolist() == [40, 41, 42, 43] and prompts.group_ids.tolist() == [40, 40, 42, 42]
    assert prompts.texts == ["ea fa ga"] * 2 + ["aa"] * 2 and prompts.columns == {"n": [2, 2, 1, 1]}
    assert len(prompts) == 4


@pytest.mark.parametrize("pad", [None, "<eos>", "<unk>"])
def test_the_mask_does_not_depend_on_the_pad_token(pad: str | None):
    """A prompt may hold the pad token: masks come from positions."""
    tokenizer = tiny.tokenizer(pad_token=pad) if pad else tiny.tokenizer()
    prompts = PromptData([{"prompt": "<eos> aa <unk>"}, {"prompt": "aa"}], tokenizer).rows(
        [0, 1], torch.tensor([0, 1]), 1, "cpu"
    )
    assert prompts.mask.tolist() == [[True, True, True], [False, False, True]]
    assert prompts.ids[1, 0] == (tokenizer.pad_token_id or 0)


def test_completions_are_decoded_by_mask_into_the_kind_of_their_prompt():
    drawn = samples(tiny.tokenizer(), ["ga", "ha"], ["aa ba", "da ea fa"])
    assert decode_completions(tiny.tokenizer(), drawn, ["ga", "ha"]) == [" aa ba", " da ea fa"]
    one = drawn.take(torch.tensor([0]))
    assert decode_completions(tiny.tokenizer(), one, [chat("ga")]) == [[{"role": "assistant", "content": "aa ba"}]]


@pytest.mark.parametrize("kind", ["pieces", "bytes"])
def test_prompt_and_completion_are_what_the_policy_wrote(kind: str):
    """SentencePiece's tokenizers drop the space of the first token that they decode."""
    tokenizer = pieces() if kind == "pieces" else tiny.byte_tokenizer()
    for prompt, completion in [("The movie", " is bad"), ("The mov", "ie is"), ("bad", " ie"), ("é", "éé a")]:
        drawn = samples(tokenizer, [prompt], [completion], tokenizer(prompt + completion).input_ids)
        assert decode_completions(tokenizer, drawn, [prompt]) == [completion]
    begun = [*chat("The movie"), {"role": "assistant", "content": "is"}]
    drawn = samples(tokenizer, ["is"], [" bad"], tokenizer("is bad").input_ids)
    assert decode_completions(tokenizer, drawn, [begun])[0][0]["content"] == " bad"


def pieces() -> Any:
    """As Llama 2's: a space is a mark on the token behind it, and a text begins with one."""
    words = [*"▁abdehimorsvTé", "▁is", "▁bad", "▁The", "▁mov", "ie"]
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in words)], 0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def samples(tokenizer: Any, prompts: list[str], completions: list[str], whole: list[int] | None = None) -> Samples:
    """Samples whose texts are given; `whole`: the tokens of the one prompt and its completion together."""
    before = [tokenizer(p).input_ids for p in prompts]
    after = [tokenizer(c).input_ids for c in completions] if whole is None else [whole[len(before[0]) :]]
    width = max(map(len, after))
    none = torch.zeros(len(prompts), dtype=torch.long)
    return Samples(
        prompt_ids=torch.tensor(before),
        prompt_mask=torch.ones(len(before), len(before[0]), dtype=torch.bool),
        completion_ids=torch.tensor([ids + [0] * (width - len(ids)) for ids in after]),
        completion_mask=torch.tensor([[t < len(ids) for t in range(width)] for ids in after]),
        finished=none.bool(),
        sample_ids=none,
        group_ids=none,
    )


# ── order


def test_each_epoch_holds_every_row_once_and_epochs_differ():
    epochs = [tuple(order(7 * e, 7, 7, seed=1)) for e in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 15
    assert order(0, 7, 7, seed=1) != order(0, 7, 7, seed=2)


@pytest.mark.parametrize("pieces", [(21,), (5, 5, 5, 6), (1,) * 21, (20, 1)])
def test_the_position_is_one_integer_also_across_epochs(pieces: tuple[int, ...]):
    stream = order(3, 21, 7, seed=0)
    position, found = 3, []
    for count in pieces:
        found += order(position, count, 7, seed=0)
        position += count
    assert found == stream
    assert sorted(stream[4:11]) == list(range(7))  # the epoch that begins at position 7


def test_more_than_one_epoch_in_one_step():
    assert sorted(order(0, 9, 3, seed=0)) == sorted(list(range(3)) * 3)


@pytest.mark.parametrize("count", [0, 1, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_partition_the_prompts(count: int, world: int):
    parts = [share(count, rank, world) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_several_templates_without_a_default_are_one_sentence():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"a": TEMPLATE, "b": TEMPLATE}
    assert "the chat template: This model has multiple" in refusal([{"prompt": chat("aa")}], tokenizer=tokenizer)


def test_a_template_file_that_is_no_text(tmp_path: Path):
    (tmp_path / "t.jinja").write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match=r"t\.jinja' cannot be read: it is no UTF-8"):
        read_chat_template(str(tmp_path / "t.jinja"))


def test_a_file_with_a_column_of_our_own(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "aa", "hfpg_row": 1}\n' * 5)
    with pytest.raises(ConfigError, match="has a column 'hfpg_row', which hfpg adds itself; rename it"):
        load_prompts(str(path), 1)


def test_a_note_of_stages_that_is_no_object_is_one_sentence(tmp_path):
    (tmp_path / "sft").mkdir()
    for text, sentence in (("[1, 2]", "stages.json holds no JSON object"), ("{", "stages.json:1: not valid JSON")):
        (tmp_path / "stages.json").write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            refuse_other(tmp_path, ["sft"], SimpleNamespace(model="m"), "model")
