"""How are gradients reduced and parameters updated: DDP, optimizer, schedule."""

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

if TYPE_CHECKING:
    from chatlearn_vllm.config import ModelArgs


def wrap_data_parallel(
    config: TransformerConfig, chunks: list[torch.nn.Module], args: "ModelArgs"
) -> list[DistributedDataParallel]:
    """Give every chunk flat gradient buffers that are reduced over the data parallel ranks."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        # Of fp16 the optimizer looks: infinity lowers the loss scale, and the step is left out.
        check_for_nan_in_grad=not config.fp16,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def build_optimizer(
    config: TransformerConfig, chunks: list[DistributedDataParallel], args: "ModelArgs"
) -> MegatronOptimizer:
    """Adam with decoupled weight decay over the wrapped chunks. Collective over all ranks.

    Its `chained_optimizers` are one for the dense parameters and, in a model with experts, a second
    one for these, on all ranks.
    """
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=args.lr,
            min_lr=args.min_lr,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_eps=args.adam_eps,
            clip_grad=args.clip_grad,
            bf16=config.bf16,
            fp16=config.fp16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=args.use_distributed_optimizer,
            overlap_param_gather=args.overlap_param_gather,
        ),
        chunks,
        use_gloo_process_groups=False,  # parallel.py makes none
    )
    for part in optimizer.chained_optimizers:
        if type(part) is DistributedOptimizer:
            # Chosen for this instance only; megatron-core's own name keeps its class.
            part.__class__ = ReshardableDistributedOptimizer
            if isinstance(part.optimizer, torch.optim.Adam):
                part.__class__ = TorchAdamDistributedOptimizer
            part.dense_part = optimizer.chained_optimizers[0]
    config.grad_scale_func = optimizer.scale_loss
    return optimizer


def build_scheduler(optimizer: MegatronOptimizer, args: "ModelArgs") -> OptimizerParamScheduler:
    """Learning rate by update number; call `step(1)` before each update, the first included.

    It is also what applies `wd_mult`, the multiplier that spares norms and biases from weight
    decay: without a scheduler they would decay as well.

    Raises:
        ValueError: the numbers of the schedule contradict each other.
    """
    warmup = args.lr_warmup_iters
    decay = args.lr_decay_iters
    if args.lr_decay_style == "constant":
        decay = max(decay or 0, warmup + 1)
    elif not decay or decay <= warmup:
        raise ValueError(
            f"lr_decay_iters={decay!r} must be set and greater than lr_warmup_iters={warmup} "
            f"for lr_decay_style={args.lr_decay_style!r}"
        )
    if args.min_lr > args.lr:
        raise ValueError(f"min_lr={args.min_lr} must be at most lr={args.lr}")
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed job follows its yaml; only the number of updates comes from the checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


class ReshardableDistributedOptimizer(DistributedOptimizer):
    """DistributedOptimizer whose checkpoints are right with several gradient buckets.

    There are several with overlap_grad_reduce, and where embeddings are tied over pipeline stages:
    those have one of their own.
    """

    dense_part: MegatronOptimizer
    """The optimizer of the dense parameters, perhaps this one; every rank has some."""

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        """As upstream, with the padding at the end of each bucket, which upstream leaves out.

        The places of parameters, by which the format `fully_reshardable` cuts these tensors, count
        it: from the second bucket on every parameter would be saved with its neighbour's numbers.
        """
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        if state is not None:
            for number, buffer in enumerate(self.buffers):
                for tensors in state[number].values():
                    for key in ("param", "exp_avg", "exp_avg_sq"):
                        tensors[key] = _with_padding(tensors[key], buffer)
        return state


def _with_padding(compact: torch.Tensor, buffer: Any) -> torch.Tensor:
    """What lies bucket after bucket -> [numel], each bucket where it is in the buffer."""
    padded = compact.new_zeros(buffer.numel)
    sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
    for bucket, part in zip(buffer.buckets, compact.split(sizes), strict=True):
        padded[bucket.offset : bucket.offset + len(part)] = part
    return padded


class TorchAdamDistributedOptimizer(ReshardableDistributedOptimizer):
    """DistributedOptimizer whose checkpoints are right with torch's Adam inside.

    Without Transformer Engine and apex megatron-core (0.16.1 to 0.19.2) uses torch's Adam, whose
    state has one `step` tensor per parameter where the fused Adams have one number per group. Its
    code for state dicts assumes the latter; what goes wrong is said at each method.
    """

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As upstream, which asserts that a step was taken: a fresh optimizer could not load.

        Nor could a pipeline stage without experts ask its optimizer of experts, which is empty.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if "step" not in state:
                    state["step"] = torch.tensor(0.0)
                    state.setdefault("exp_avg", torch.zeros_like(parameter.data))
                    state.setdefault("exp_avg_sq", torch.zeros_like(parameter.data))
        if not self.optimizer.state:
            return self._state_dict_without_parameters()
        return super().state_dict(*args, **kwargs)

    def _state_dict_without_parameters(self) -> dict[str, Any]:
        dense = self.dense_part.state_dict()  # both make their steps together
        (step,) = {group["step"] for group in dense["optimizer"]["param_groups"]}
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"step": step}
            for group in self.optimizer.param_groups
        ]
        return {**dense, "optimizer": {"param_groups": groups}}

    @torch.no_grad()  # float32 shards are views of leaf parameters, which are copied into
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As upstream, which lets all parameters share one `step`: each update counts it up again.

        Measured: after two more updates `step` was 30 instead of 4, and so was Adam's bias
        correction.

        A resumed job takes its learning rates from its yaml. megatron-core 0.19 knows a group of
        parameters by them, so the saved groups get those of this job (all groups have the same).
        """
        own = self.optimizer.param_groups[0]
        for saved in state_dict["optimizer"]["param_groups"]:
            saved.update({key: own[key] for key in ("max_lr", "min_lr") if key in own})
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(
        self, model_param: torch.nn.Parameter, tensors: dict[str, Any]
    ) -> None:
        """Upstream looks for `step` among the saved tensors, where it is not: KeyError."""
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        targets = {"param": main_param, **self.optimizer.state[main_param]}
        for name, value in tensors.items():
            if name in targets and name != "step":
                targets[name].copy_(value)
