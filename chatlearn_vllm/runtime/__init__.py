"""Where ranks run, how they are called, what one episode does; the only package that imports ray.

session.py              the job of this process
grpo_engine.py          what one episode does, in order; sft_engine.py likewise
engine.py               what engines share: set-up, loop, tear-down
cluster.py              from a placement plan to running ranks, and their end
worker_group.py         one call to all ranks of a model, one failure back
worker.py               inside a rank
weight_synchronizer.py  the driver's part of a weight sync
memory.py               who is in device memory while colocated models take turns
rollout.py, evaluator.py, scatter.py, episode_metrics.py, checkpoint.py, errors.py
"""
