"""What happens in one episode of supervised fine-tuning?"""

from __future__ import annotations

from chatlearn_vllm.runtime.record_engine import RecordEngine


class SFTEngine(RecordEngine):
    """Trains a model on given responses; records are dicts with `prompt` and `response`.

    Example:
        engine = SFTEngine(policy_trainer)
        engine.set_dataset(load_prompts("sft.jsonl"))
        engine.learn()
    """
