"""Where ranks run, how they are called, what one episode does; the only package that imports ray.

session.py              the job of this process
rollout_engine.py       what one episode does, in order
grpo_engine.py, rlhf_engine.py, online_dpo_engine.py    what is made of its samples to train on
flow_engine.py, flow_steps.py    episodes that a user's flows describe
evaluator.py, eval_engine.py     evaluation, beside training and without
sft_engine.py           training on given responses
base_engine.py          what engines share: set-up, loop, tear-down
cluster.py              from a placement plan to running ranks, and their end
worker_group.py         one call to all ranks of a model, one failure back
worker.py               inside a rank
weight_synchronizer.py  the driver's part of a weight sync
memory.py               who is in device memory while colocated models take turns
rollout.py, scatter.py, episode_metrics.py, checkpoint.py, errors.py
"""
