"""Are prompt files read, tokenised and ordered as documented, and are bad ones explained?"""

import json
from pathlib import Path

import pytest

from chatlearn_vllm.config import UserError
from chatlearn_vllm.data.prompts import (
    PromptPipeline,
    PromptSampler,
    VLLMPromptPipeline,
    load_prompts,
    require_prompt,
    require_records,
)


class CodePointTokenizer:
    """One token per character, with or without a BOS (id 1)."""

    def __init__(self, bos_token_id: int | None = None):
        self.bos_token_id = bos_token_id

    def encode(self, text: str) -> list[int]:
        head = [] if self.bos_token_id is None else [self.bos_token_id]
        return head + [ord(character) for character in text]


class SpecialTokensTokenizer(CodePointTokenizer):
    """Adds BOS (id 1) and EOS (id 2) if it is to, and knows both where a text has them."""

    bos_token, eos_token, eos_token_id = "<s>", "</s>", 2

    def __init__(self, adds_bos: bool = True, adds_eos: bool = True):
        super().__init__(bos_token_id=1)
        self.head, self.tail = [1] * adds_bos, [2] * adds_eos

    def encode(self, text: str) -> list[int]:
        """Of a text without its outer blanks, as some tokenizers do it."""
        texts = {"\x01": 1, "\x02": 2}
        text = text.strip(" ").replace("<s>", "\x01").replace("</s>", "\x02")
        ids = [texts.get(character, ord(character)) for character in text]
        return self.head + ids + self.tail


def write_jsonl(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def test_all_three_formats_become_a_prompt(tmp_path):
    path = write_jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "1+1="},
        {"query": "1+1?"},
        {"text": "\n\nHuman: 1?\n\nAssistant: 1\n\nHuman: 2?\n\nAssistant: 2"},
    )
    assert load_prompts(path) == [
        {"prompt": "1+1="},
        {"prompt": "\n\nHuman: 1+1?\n\nAssistant: "},
        {"prompt": "\n\nHuman: 1?\n\nAssistant: 1\n\nHuman: 2?\n\nAssistant: "},
    ]


def test_extra_fields_are_kept_and_missing_ones_are_none(tmp_path):
    path = write_jsonl(
        tmp_path / "p.jsonl", {"prompt": "1+1=", "answer": "2"}, {"query": "?", "level": 3}
    )
    first, second = load_prompts(path)
    assert first == {"prompt": "1+1=", "answer": "2", "level": None}
    assert second["answer"] is None and second["level"] == 3


def test_files_are_read_one_after_another(tmp_path):
    first = write_jsonl(tmp_path / "b.jsonl", {"prompt": "1"}, {"prompt": "2", "level": 3})
    second = write_jsonl(tmp_path / "a.jsonl", {"query": "?"})
    prompts = [record["prompt"] for record in load_prompts([first, str(second)])]
    assert prompts == ["1", "2", "\n\nHuman: ?\n\nAssistant: "]
    assert load_prompts(str(first)) == load_prompts(first)


@pytest.mark.parametrize(("limit", "prompts"), [(-1, "123"), (0, ""), (1, "1"), (9, "123")])
def test_a_limit_keeps_the_first_records_and_the_fields_of_all(tmp_path, limit, prompts):
    path = write_jsonl(
        tmp_path / "p.jsonl", {"prompt": "1"}, {"prompt": "2"}, {"prompt": "3", "level": 3}
    )
    records = load_prompts(path, limit=limit)
    assert "".join(record["prompt"] for record in records) == prompts
    assert all(record.keys() == {"prompt", "level"} for record in records)


@pytest.mark.parametrize("name", ["p.jsonl", Path("p.jsonl")])
def test_the_name_of_a_file_is_no_list_of_prompts(name):
    with pytest.raises(ValueError, match=r"set_dataset\(load_prompts\('p.jsonl'\)\)"):
        require_records(name)
    require_records(["p.jsonl"])


def test_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prompt": "ü"}\n\n', encoding="utf-8")
    assert load_prompts(path) == [{"prompt": "ü"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a"',
            r"p.jsonl, line 2: is not valid JSON \(Expecting ',' delimiter, column 15",
        ),
        ('["a"]', r"line 2: is a JSON list, must be an object"),
        ('{"question": "a"}', r"line 2: has keys \['question'\], needs one of \['prompt', 'qu"),
        ('{"prompt": ""}', r"line 2: key 'prompt' is '', must be a non-empty string"),
        ('{"query": 3}', r"line 2: key 'query' is 3, must be a non-empty string"),
        ('{"text": "no tag"}', r"line 2: key 'text' lacks '\\n\\nAssistant: '"),
        ('{"prompt": "a", "rewards": 1}', r"line 2: keys \['rewards'\] are used by the framework"),
    ],
)
def test_a_bad_line_is_named_with_file_number_and_key(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "good"}\n' + line, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_prompts(path)


def test_all_bad_lines_are_reported_up_to_ten(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", *({"prompt": ""} for _ in range(12)))
    with pytest.raises(UserError) as error:
        load_prompts(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 11 and lines[-1] == "... and 2 more"
    write_jsonl(path, *({"prompt": ""} for _ in range(10)))
    with pytest.raises(ValueError) as error:
        load_prompts(path)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{path}, line {n}" for n in range(1, 11)]


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(UserError, match="from, only None; set runtime.data_path, and runtime.ev"):
        load_prompts(None)
    with pytest.raises(UserError, match="none.jsonl does not exist"):
        load_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="empty.jsonl holds no record"):
        load_prompts(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("prompts", "prompt_key"),
    [
        (["abc"], None),
        ([("abc", "chosen", "rejected")], None),
        ([["abc", "chosen"]], None),
        ([{"prompt": "abc"}], None),
        ([{"prompt": "abc"}], "prompt"),
    ],
)
def test_texts_tuples_and_dicts_give_the_same_item(prompts, prompt_key):
    tokenizer = CodePointTokenizer()
    pipeline = VLLMPromptPipeline(prompts, 8, tokenizer, prompt_key)
    assert pipeline.tokenizer is tokenizer
    assert len(pipeline) == 1
    assert pipeline[0] == {"input_ids": [97, 98, 99], "prompt": "abc"}


def test_a_record_keeps_its_fields_and_is_not_changed():
    record = {"question": "ab", "answer": "x"}
    pipeline = VLLMPromptPipeline([record, record], 8, CodePointTokenizer(), "question")
    assert pipeline[1] == {"question": "ab", "answer": "x", "input_ids": [97, 98], "prompt": "ab"}
    assert record == {"question": "ab", "answer": "x"}
    pipeline[0]["input_ids"].append(0)
    assert pipeline[1]["input_ids"] == [97, 98]


@pytest.mark.parametrize(
    ("bos", "max_length", "expected"),
    [(None, 2, "bc"), (None, 3, "abc"), (1, 3, "\x01bc"), (1, 2, "\x01c"), (1, 1, "c")],
)
def test_a_long_prompt_loses_tokens_at_its_head_but_not_the_bos(bos, max_length, expected):
    pipeline = VLLMPromptPipeline(["abc"], max_length, CodePointTokenizer(bos))
    assert pipeline[0]["input_ids"] == [ord(character) for character in expected]
    assert pipeline[0]["prompt"] == "abc"


@pytest.mark.parametrize(
    ("prompts", "prompt_key", "message"),
    [
        (["a", ""], None, r"prompts\[1\] \(key 'prompt'\) is '', must be a non-empty string"),
        ([{"query": "a"}], None, r"prompts\[0\] \(key 'prompt'\) is None"),
        ([{"prompt": "a"}], "query", r"prompts\[0\] \(key 'query'\) is None"),
        ([()], None, r"prompts\[0\] \(key 'prompt'\) is None"),
        ([3], None, r"prompts\[0\] \(key 'prompt'\) is 3, must be a non-empty string"),
    ],
)
def test_an_empty_or_missing_prompt_is_named(prompts, prompt_key, message):
    with pytest.raises(ValueError, match=message):
        VLLMPromptPipeline(prompts, 8, CodePointTokenizer(), prompt_key)


def test_no_room_for_a_prompt_is_an_error():
    with pytest.raises(ValueError, match="max_prompt_length=0 must be at least 1"):
        VLLMPromptPipeline(["a"], 0, CodePointTokenizer())


def test_a_pipeline_without_a_tokenizer_is_an_error():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        VLLMPromptPipeline(["a"], 8)


def test_collate_gives_a_dict_of_lists():
    pipeline = PromptPipeline(
        [{"prompt": "ab", "answer": 1}, {"prompt": "c", "answer": 2}], 8, CodePointTokenizer()
    )
    collated = pipeline.collate_fn([pipeline[0], pipeline[1]])
    assert collated == {
        "prompt": ["ab", "c"],
        "answer": [1, 2],
        "input_ids": [[97, 98], [99]],
    }
    assert pipeline.collate_fn([]) == {}
    with pytest.raises(ValueError, match=r"differ in fields \['extra'\]"):
        pipeline.collate_fn([pipeline[0], pipeline[1] | {"extra": 1}])


@pytest.mark.parametrize("attribute", ["data", "prompts_ids"])
def test_a_user_pipeline_may_fill_either_attribute(attribute):
    class OwnPipeline(PromptPipeline):
        def __init__(self, prompts, tokenizer):
            setattr(self, attribute, [])
            for prompt in prompts:
                item = {"input_ids": tokenizer.encode(prompt), "prompt": prompt}
                getattr(self, attribute).extend([item])

    pipeline = OwnPipeline(["a", "b"], CodePointTokenizer())
    assert len(pipeline) == 2
    assert pipeline.num_cut == 0
    assert pipeline.collate_fn([pipeline[1]]) == {"input_ids": [[98]], "prompt": ["b"]}


def test_every_epoch_of_the_sampler_holds_each_row_once_in_another_order():
    sampler = PromptSampler(10, seed=0)
    epochs = [sampler.next(10) for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_alone():
    assert PromptSampler(50, seed=3).next(120) == PromptSampler(50, seed=3).next(120)
    assert PromptSampler(50, seed=3).next(50) != PromptSampler(50, seed=4).next(50)
    one_by_one = PromptSampler(50, seed=3)
    assert [one_by_one.next(1)[0] for _ in range(120)] == PromptSampler(50, seed=3).next(120)


def test_the_order_is_the_same_in_every_version():
    assert PromptSampler(5, seed=3).next(10) == [1, 0, 2, 3, 4, 1, 2, 0, 3, 4]


def test_a_single_row_comes_again_and_again():
    assert PromptSampler(1, seed=0).next(3) == [0, 0, 0]


def test_without_shuffle_rows_come_in_order_and_start_again():
    sampler = PromptSampler(3, seed=0, shuffle=False)
    assert sampler.next(2) == [0, 1]
    assert sampler.next(5) == [2, 0, 1, 2, 0]


def test_a_resumed_sampler_continues_in_the_middle_of_an_epoch():
    sampler = PromptSampler(7, seed=1)
    sampler.next(10)
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = PromptSampler(7, seed=1)
    resumed.load_state_dict(state)
    assert resumed.next(20) == sampler.next(20)


@pytest.mark.parametrize(
    ("today", "message"),
    [
        ({"num_prompts": 8}, "num_prompts was 7 when it was saved and is 8 now"),
        ({"seed": 2}, "seed was 1 when it was saved and is 2 now"),
        ({"shuffle": False}, "shuffle was True when it was saved and is False now"),
    ],
)
def test_resuming_in_another_order_is_refused(today, message):
    state = PromptSampler(7, seed=1).state_dict()
    with pytest.raises(ValueError, match=message):
        PromptSampler(**{"num_prompts": 7, "seed": 1, **today}).load_state_dict(state)


def test_a_sampler_without_rows_is_refused():
    with pytest.raises(ValueError, match="num_prompts=0"):
        PromptSampler(0, seed=1)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("hi", [1, ord("h"), ord("i")]),
        ("<s>hi", [1, ord("h"), ord("i")]),
        ("<s>hi</s>", [1, ord("h"), ord("i"), 2]),
        ("</s>", [1, 2]),
    ],
)
def test_special_tokens_that_a_text_has_or_cannot_have_are_not_added(text, ids):
    (item,) = PromptPipeline([text], 8, SpecialTokensTokenizer())
    assert item["input_ids"] == ids


@pytest.mark.parametrize(
    ("adds_eos", "text", "ids"),
    [
        (False, "<s>hi", [1, ord("h"), ord("i")]),
        (False, "hi</s>", [ord("h"), ord("i"), 2]),
        (False, "hi", [ord("h"), ord("i")]),
        (True, "h", [ord("h")]),
        (True, " ", [2]),  # a prompt has a token
    ],
)
def test_special_tokens_of_a_text_stay_where_a_tokenizer_adds_none_of_them(adds_eos, text, ids):
    (item,) = PromptPipeline([text], 8, SpecialTokensTokenizer(adds_bos=False, adds_eos=adds_eos))
    assert item["input_ids"] == ids


def test_prompts_that_were_cut_are_counted():
    pipeline = VLLMPromptPipeline(["abc", "abcd", "abcde"], 3, CodePointTokenizer())
    assert pipeline.num_cut == 2
    assert PromptPipeline(["abc"], 3, CodePointTokenizer()).num_cut == 0


def test_the_prompt_may_have_another_name_in_a_file(tmp_path):
    path = write_jsonl(
        tmp_path / "p.jsonl", {"question": "1+1=", "answer": "2", "prompt": "?"}, {"query": "1?"}
    )
    first, second = load_prompts(path, prompt_key="question")
    assert first == {"prompt": "1+1=", "question": "1+1=", "answer": "2"}
    assert second["prompt"] == "\n\nHuman: 1?\n\nAssistant: "
    (item,) = VLLMPromptPipeline([first], 9, CodePointTokenizer(), prompt_key="question")
    assert (item["prompt"], len(item["input_ids"])) == ("1+1=", 4)
    with pytest.raises(ValueError, match=r"needs one of \['ask', 'prompt', 'query', 'text'\]"):
        load_prompts(write_jsonl(tmp_path / "q.jsonl", {"question": "1"}), prompt_key="ask")


def test_text_and_tokens_of_a_prompt_in_the_wrong_order_are_told() -> None:
    require_prompt(0, "1+1=", [1, 5], 1, 3)
    require_prompt(0, None, (1, 5), 1, 3)
    with pytest.raises(ValueError, match=r"prompt 2: .* the text \[1, 5\] and the tokens '1\+1='"):
        require_prompt(2, [1, 5], "1+1=", 1, 3)
    with pytest.raises(ValueError, match="prompt 2 has 3 tokens: no room for a response in seq_le"):
        require_prompt(2, "1+1=", [1, 5, 6], 0, 3)
