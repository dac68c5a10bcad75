"""Which value does a piece of yaml text stand for?"""

import pytest
import yaml

from chatlearn_vllm.config.scalars import JobYamlLoader, UnsetVariableError, fill, typed

ENV = {"NUM": "4", "HOST": "h", "EMPTY": "", "FLAG": "False", "NESTED": "${NUM}"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-9", 1e-9),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("0x10", 16),
        ("True", True),
        ("off", False),
        ("None", None),
        ("null", None),
        ("", None),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
        ("'3'", "3"),
        ("12:30", "12:30"),
        ("010", "010"),
        ("2024-01-01", "2024-01-01"),
        ("a: b", "a: b"),
        ("[unclosed", "[unclosed"),
    ],
)
def test_text_is_typed_like_yaml(text, value):
    assert typed(text) == value
    assert type(typed(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain", "plain"),
        ("${NUM}", 4),
        ("${NUM:8}", 4),
        ("${UNSET:8}", 8),
        ("${UNSET:1e-9}", 1e-9),
        ("${UNSET:None}", None),
        ("${UNSET:}", None),
        ("${EMPTY:8}", None),
        ("${FLAG:True}", False),
        ("${UNSET:[a, b]}", ["a", "b"]),
        ("${UNSET:http://host:80/x}", "http://host:80/x"),
        ("${UNSET:12:30}", "12:30"),
        ("${HOST}/${NUM}", "h/4"),
        ("a-${NUM}", "a-4"),
        ("${UNSET:${NUM:2}}", 4),
        ("${UNSET:${HOST}/${ALSO_UNSET:x}}", "h/x"),
        ("${NESTED}", "${NUM}"),
    ],
)
def test_templates_take_the_environment_or_the_default(text, value):
    assert fill(text, ENV) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${UNSET}", "UNSET is not set and there is no default"),
        ("x${NUM", "no closing brace"),
        ("${1a:2}", "not the name of an environment variable"),
    ],
)
def test_bad_templates_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        fill(text, ENV)


def test_a_key_given_twice_in_a_yaml_takes_its_last_value_and_is_noted():
    loader = JobYamlLoader("a: 1\nb: 2\na: 3\n")
    assert loader.get_single_data() == {"a": 3, "b": 2}
    assert loader.repeated == ["line 3: key 'a' is given twice"]


@pytest.mark.parametrize(
    ("text", "kind"), [("${UNSET}", UnsetVariableError), ("x${UNSET}", ValueError)]
)
def test_only_a_template_alone_may_be_left_out(text, kind):
    with pytest.raises(ValueError, match="UNSET is not set") as error:
        fill(text, ENV)
    assert type(error.value) is kind


def test_yaml_merge_keys_work():
    loaded = yaml.load("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\n", JobYamlLoader)
    assert loaded["d"] == {"b": 1, "c": 3}
