"""What do records of supervised fine-tuning have to hold?"""

import pytest

from chatlearn_vllm.config import load_config
from examples.megatron.make_tiny_llama import write_tokenizer
from examples.megatron.models.sft_trainer import SFTTrainer


@pytest.fixture
def trainer(tmp_path):
    write_tokenizer(tmp_path, model_max_length=64)
    path = tmp_path / "job.yaml"
    args = f"{{tokenizer: {tmp_path}, seq_length: 12, max_new_tokens: 4}}"
    path.write_text(
        f"models: {{trainer: {{num_gpu: 1, trainable: True, model_args: {args}}}}}\n"
        "runtime: {sample_per_episode: 4, train_micro_batch_size: 4, train_global_batch_size: 4}\n"
    )
    trainer = SFTTrainer("trainer", load_config(path))
    trainer.setup()
    return trainer


def test_prompt_and_response_are_one_row_and_the_response_is_learned(trainer) -> None:
    batch = trainer.encode([{"prompt": "1+1=", "response": "2"}])
    eos = trainer.tokenizer.eos_token_id
    text = trainer.tokenizer.encode("1+1=2")
    assert batch["all_tokens"].tolist() == [[*text, eos] + [eos] * (11 - len(text))]
    first = len(trainer.tokenizer.encode("1+1="))
    assert batch["loss_mask"].nonzero()[:, 1].tolist() == list(range(first, len(text) + 1))


@pytest.mark.parametrize("record", [{"prompt": "1+1="}, {"prompt": "1+1=", "response": 2}])
def test_a_record_without_a_text_to_learn_is_named(trainer, record) -> None:
    with pytest.raises(ValueError, match=r"record \{'prompt': '1\+1=.*\} has no 'response'"):
        trainer.encode([{"prompt": "2+2=", "response": "4"}, record])


def test_a_record_that_is_too_long_is_named(trainer) -> None:
    with pytest.raises(ValueError, match=r"record '1\+1=' has \d+ tokens, seq_length is 12"):
        trainer.encode([{"prompt": "1+1=", "response": "2" * 20}])
