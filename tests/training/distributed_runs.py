"""What each of two gloo processes does; test_distributed.py starts it with FOLDER."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from training_cases import tiny_config

from seqmodels.channel import ChunkMoE
from seqmodels.training.loop import train

PLAIN = {"vocab_size": 256, "d_model": 16, "pattern": "gated_conv chunk_moe linear_attention|swiglu", "meta_tokens": 3}
PLAIN["layers"] = {
    "linear_attention": {"num_heads": 2, "decay": "fixed"},
    "swiglu": {"path_gate": 0.5},  # a metric, read when FSDP2 has freed the whole gate
    # Loads are summed over the processes; the auxiliary losses are means over a process's own chunks.
    "chunk_moe": {"num_experts": 4, "d_hidden": 8, "chunk_size": 8, "balance": "bias", "z_weight": 0.0},
}
CHANGES = {"model": PLAIN, "accumulation": 2, "checkpoint": {"every": 3, "keep": 9}}
LINKED = PLAIN | {"pattern": "gated_conv workspace linear_attention product_key_memory"}


def linked(parallel: str) -> dict:
    """States carried from step to step, gradients through two windows, and under DDP a table with sparse gradients."""
    layers = {
        "linear_attention": {"num_heads": 2, "decay": "fixed"},
        "workspace": {"num_slots": 4, "rank": 4, "active": 2, "segment": 8},
        "product_key_memory": {
            "num_heads": 2, "top_k": 2, "query_dim": 4, "num_subkeys": 6, "value_dim": 4, "dropout": 0.0,
            "sparse": parallel == "ddp",
        },
    }  # fmt: skip
    stages = [{"name": "alone", "share": 0.5}, {"name": "linked", "share": 0.5, "sequence_length": 16}]
    stages[1] |= {"carry_state": True, "backpropagation_windows": 2, "activates": ["workspace"]}
    return {
        "model": LINKED | {"layers": layers},
        "curriculum": {"stages": stages},
        "checkpoint": {"every": 6, "keep": 9},
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for parallel in ("ddp", "fsdp"):
            config = tiny_config(folder / f"rank{dist.get_rank()}", parallel=parallel, **CHANGES)
            train(config, folder / parallel)
            train(
                tiny_config(folder / f"rank{dist.get_rank()}", parallel=parallel, **linked(parallel)),
                folder / f"linked_{parallel}",
            )
        # The sharded run again from its first checkpoint.
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.copytree(folder / "fsdp", folder / "resumed")
            for name in ("step_00000006", "step_00000008"):
                shutil.rmtree(folder / "resumed" / "checkpoints" / name)
        dist.barrier()
        config = tiny_config(folder / f"rank{dist.get_rank()}", parallel="fsdp", **CHANGES)
        train(config, folder / "resumed", resume=True)
        # Loads of [4, 0, 0, 0] and [0, 6, 1, 1].
        experts = ChunkMoE(8, num_experts=4, d_hidden=4, balance="bias", balance_weight=0.5)
        experts.assigned.copy_(torch.tensor([[4, 0, 0, 0], [0, 6, 1, 1]][dist.get_rank()]))
        experts.after_optimizer_step()
        torch.save(experts.selection_bias, folder / f"bias_{dist.get_rank()}")
        # An error of the main process reaches the other one.
        try:
            train(config, folder / "resumed")
        except RuntimeError as error:
            (folder / f"error_{dist.get_rank()}").write_text(str(error))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
