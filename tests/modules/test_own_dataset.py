"""Is a policy's own `build_dataset` told at once what it has to return?"""

import pytest

from chatlearn_vllm.data.prompts import VLLMPromptPipeline
from tests.helpers.documented_policy import VLLMPolicyInference
from tests.helpers.engines import policy_job, start_policy
from tests.helpers.tiny_llama import save_tiny_llama


class OwnDataset(VLLMPolicyInference):
    returned = None

    def build_dataset(self, train_prompts, is_eval=False):
        return self.returned


@pytest.fixture
def policy(tmp_path):
    save_tiny_llama(tmp_path / "model")
    return OwnDataset("policy", policy_job(tmp_path, tmp_path / "model"))


ROWS = [{"prompt": "1+1=", "input_ids": [1, 5]}]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"build_dataset\(is_eval=True\) returned no prompts for 2 records"),
        ([], "returned no prompts for 2 records"),
        (ROWS, r"returned list, which has no collate_fn; it must return a sequence of dicts"),
        (iter(ROWS), "list_iterator, which has no __len__, __getitem__, collate_fn"),
    ],
)
def test_what_is_no_dataset_is_refused_when_it_is_built(policy, returned, message) -> None:
    policy.returned = returned
    with pytest.raises(ValueError, match=message):
        policy.build_prompts(["1+1=", "2+2="], is_eval=True)


def test_a_dataset_of_ones_own_is_taken(policy) -> None:
    policy.returned = VLLMPromptPipeline(["1+1="], 8, policy.tokenizer.tokenizer)
    assert policy.build_prompts(["1+1=", "2+2="]) == 1


class Prompts(list):
    """The least that will do, as in docs/vllm_module.md."""

    def collate_fn(self, samples):
        return {key: [sample[key] for sample in samples] for key in ("input_ids", "prompt")}


def test_the_least_dataset_is_answered(tmp_path) -> None:
    save_tiny_llama(tmp_path / "model")
    job = policy_job(tmp_path, tmp_path / "model", load_format="auto", n=2)
    policy = start_policy(OwnDataset, job)
    policy.returned = Prompts([*ROWS, {"prompt": "7+8=", "input_ids": [1, 6, 7]}])
    assert policy.build_prompts(["1+1=", "7+8="]) == 2
    batch = policy.generate([0, 1], first_sample=0)
    assert batch["str_prompts"] == ["1+1=", "1+1=", "7+8=", "7+8="]
    assert [ids.tolist() for ids in batch["no_padded_query_ids"]] == [[1, 5]] * 2 + [[1, 6, 7]] * 2

    policy.returned = Prompts([*ROWS, {"prompt": "7+8=", "input_ids": [1, 6, 7], "answer": "15"}])
    policy.build_prompts(["1+1=", "7+8="])
    for rows in ([0, 1], [1, 0]):
        with pytest.raises(ValueError, match=r"prompt records .* differ in fields \['answer'\]"):
            policy.generate(rows, first_sample=0)
    assert policy.generate([1], first_sample=0)["answer"] == ["15", "15"]

    policy._add_request = lambda data, is_eval: policy._add_request_internal(
        data["input_ids"], data["prompt"]
    )
    with pytest.raises(
        ValueError, match=r"prompt 0: _add_request_internal\(texts, token_ids\) got"
    ):
        policy.generate([0, 1], first_sample=0)
    policy.shutdown()
