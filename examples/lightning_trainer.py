"""Lightning trains two-bit weights over two processes and resumes from its own checkpoint.

Run: python examples/lightning_trainer.py [ddp, or fsdp for FSDP2]
"""

import sys

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import askew_kernels as ak

EPOCHS, STEPS = 4, 25  # of an epoch
kind = sys.argv[1] if len(sys.argv) > 1 else "ddp"
templates = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))


class Task(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        ak.quantize_(self.model, ak.QuantConfig(weight=ak.quant.Uniform(bits=2)))

    def configure_model(self):
        if kind == "fsdp" and not hasattr(self.model, "reshard"):  # it is called again for testing
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        optimizer = ak.optim.ASkewAdamW(ak.param_groups(self.model), lr=3e-3)
        recipe = ak.Recipe(self.model, optimizer, EPOCHS * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": recipe, "interval": "step"}}

    def training_step(self, y, index):
        return functional.cross_entropy(self.model(templates[y] + 2 * torch.randn(len(y), 64)), y)


def fit(epochs, **options):
    strategy = DDPStrategy(process_group_backend="gloo") if kind == "ddp" else ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")  # fmt: skip
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", devices=2, strategy=strategy, logger=False,
                                enable_progress_bar=False, enable_model_summary=False,
                                enable_checkpointing=False)  # fmt: skip
    trainer.fit(task := Task(), torch.utils.data.DataLoader(torch.arange(64 * 2 * STEPS) % 10, 64, True), **options)
    return trainer, task.model


if __name__ == "__main__":
    torch.manual_seed(1)
    trainer, _ = fit(EPOCHS // 2)
    trainer.save_checkpoint("half.ckpt")
    trainer, model = fit(EPOCHS, ckpt_path="half.ckpt")
    ak.hard_quantize_(model)
    y = torch.arange(4000) % 10
    hits = model(templates[y] + 2 * torch.randn(4000, 64)).argmax(1) == y
    if trainer.is_global_zero:
        print(f"{trainer.world_size} processes, step {trainer.global_step}, 2 bits {hits.float().mean().item():.1%}")
