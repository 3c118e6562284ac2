"""transformers' Trainer trains a small Llama to ternary weights and resumes from its own checkpoint.

Run: python examples/transformers_trainer.py (or under torchrun)
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import askew_kernels as ak

STEPS = 60


class Counting(torch.utils.data.Dataset):
    """Numbers from 0 to 31 that go up by 1 to 3."""

    def __len__(self):
        return 16 * STEPS

    def __getitem__(self, i):
        line = (torch.arange(16) * (i % 3 + 1) + i // 3) % 32
        return {"input_ids": line, "labels": line}


def trainer():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config)
    ak.quantize_(model, {"lm_head": None, "*": ak.QuantConfig(weight=ak.quant.Ternary())})
    optimizer = ak.optim.ASkewAdamW(ak.param_groups(model), lr=5e-3)
    options = TrainingArguments("trainer", max_steps=STEPS, per_device_train_batch_size=16, save_steps=STEPS // 2,
                                use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no")  # fmt: skip
    return Trainer(model, options, train_dataset=Counting(), optimizers=(optimizer, ak.Recipe(model, optimizer, STEPS)))


whole = trainer()
whole.train()
again = trainer()  # in a new process
again.train(resume_from_checkpoint=f"trainer/checkpoint-{STEPS // 2}")
same = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
model = ak.hard_quantize_(again.model).eval()
line = Counting()[7]["input_ids"][None]
hits = model(line).logits[0, 2:-1].argmax(-1) == line[0, 3:]
print(f"ternary, next number {hits.float().mean().item():.0%}, bit for bit the same: {same}")
