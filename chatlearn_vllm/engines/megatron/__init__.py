"""megatron-core on a replica's ranks: model, optimizer, schedules, checkpoints.

The only package that imports megatron.core. In reading order:

    engine.py           MegatronEngine: what modules/megatron_module.py drives
    settings.py         what keys of the yaml mean for megatron-core
    parallel.py         process group, parallel groups, seeds
    architectures.py    Hugging Face config.json -> TransformerConfig
    model.py            GPTModel chunks of this rank
    norm.py, attention.py   the two modules put in place of megatron-core's own
    scalar_head.py      what a value or reward model has in place of the vocabulary projection
    parameters.py       names and layouts of what this rank holds
    init_weights.py     the weights a model begins with
    hf_checkpoint.py    Hugging Face safetensors in and out
    batching.py, micro_batches.py   rows -> micro-batches that the ranks agree on
    logprobs.py         log-probabilities and entropy from vocabulary-parallel logits
    optimizer.py        data parallel wrapper, optimizer, schedule
    offload.py          device memory out and back in
    checkpoint.py       megatron-core's dist_checkpointing, for resume
    background_writer.py    writes its tensors while training goes on
    checkpoint_files.py     which checkpoints are whole; which may go
    export.py           a checkpoint -> Hugging Face form or PEFT, in one process
    cpu.py              what lets all of this run without a GPU
"""

import warnings

# Said by five modules of megatron-core, on every rank; this package is made to do without both.
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
